"""
Why tests of Prismer are skipped: a written reason -> a regular expression that finds its skips among the lines
`test: message of the skip`. The first that fits counts.
"""

REASONS = {
    # ---- sharding ----
    "the library's tests of FSDP and tensor parallelism run for some language models only": (
        r"distributed tests are not enabled|FSDP workers"
    ),
    "for models with a plan for tensor parallelism, of which Prismer has none": r"TP plan|tensor parallel plan",
    # ---- what Prismer is not ----
    "for another pipeline than image-text-to-text": r"test_pipeline_(?!image_text_to_text)",
    "for another modality (sound, video)": r"video|audio",
    "for processors with a chat template": r"no chat template",
    "for processors with placeholder tokens for the image": r"_get_num_multimodal_tokens",
    "for image processors that check their arguments by a decorator": r"No validation found for `preprocess`",
    "for models of one part; the test for models of several parts runs": r"sdpa_can_dispatch_non_composite",
    "for positions in one dimension; the resizing of ours is tested in tests/modeling_prismer": (
        r"test_resize_position_vector_embeddings"
    ),
    "part of a test, for image processors with their mean as a list": r"does not have dict size or list image_mean",
    "part of a test, for models whose checkpoints had other names": r"No conversion found|Only PrefixChange",
    "part of a test, for models that keep modules in float32": r"_keep_in_fp32_modules",
    "for another architecture (mixture of experts, rotary positions, sliding windows, encoder-decoder)": (
        r"MoE|sparse experts|router_logits|grouped_mm|expert parallel plan|RoPE|partial rope|sliding window"
        r"|not an encoder-decoder"
    ),
    # ---- this environment ----
    "needs Flash Attention or a downloaded kernel, which need a GPU": (
        r"requires (Flash Attention|the kernels library)"
    ),
    "needs deepspeed": r"requires deepspeed",
    "needs an accelerator": r"requires (multiple )?accelerators?$|requires MPS",
    "marked as slow: the library does not run it by default either": r"test is slow",
    # ---- what Prismer does on purpose; the library's models do not skip these ----
    "a text without an image is refused": r"test_processor_text_has_no_visual|refuses a conversation without an image",
    "a template gets every image in one form, without its address": r"A template gets every image",
    "a question has no calls of tools": r"Chat template does not support tools",
    "a prompt's length and padding are the task's, not those saved with the tokenizer": r"saved with the tokenizer",
    "every image becomes RGB": r"test_call_numpy_4_channels",
    "several encoders are joined: their hidden states and attention are not returned": r"several encoders are joined",
}
