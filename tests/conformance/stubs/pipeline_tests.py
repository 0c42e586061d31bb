"""The pipelines' own tests are not in the sdist: a short one of ours for image-text-to-text, on a model made here."""

import numpy as np
from PIL import Image
from transformers import ImageTextToTextPipeline


class ImageTextToTextPipelineTests:
    def get_test_pipeline(self, model, tokenizer, processor, image_processor=None, dtype="float32", **kwargs):
        pipeline = ImageTextToTextPipeline(model=model, processor=processor, dtype=dtype, max_new_tokens=4)
        pixels = np.random.default_rng(0).integers(0, 256, (2, 24, 40, 3), dtype=np.uint8)
        examples = [{"images": Image.fromarray(picture), "text": "A picture of"} for picture in pixels]
        return pipeline, examples

    def run_pipeline_test(self, pipeline, examples):
        picture, text = examples[0]["images"], examples[0]["text"]
        (result,) = pipeline(picture, text=text)
        assert result["input_text"] == text and isinstance(result["generated_text"], str)
        results = pipeline([example["images"] for example in examples], text=[text] * len(examples))
        assert len(results) == len(examples)
        (tokens,) = pipeline(picture, text=text, return_tensors=True)
        assert tokens["generated_token_ids"].ndim == 1
