"""Small random models of the classes that the experts load, saved with their image processors."""

import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertTokenizer,
    BitConfig,
    CHMv2Config,
    CHMv2ForDepthEstimation,
    CHMv2ImageProcessor,
    CLIPTokenizer,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    DepthProConfig,
    DepthProForDepthEstimation,
    DepthProImageProcessor,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    DFineConfig,
    DFineForObjectDetection,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessor,
    EdgeTamConfig,
    EdgeTamModel,
    EdgeTamVisionConfig,
    EomtConfig,
    EomtForUniversalSegmentation,
    EomtImageProcessor,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    HGNetV2Config,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    OmDetTurboConfig,
    OmDetTurboForObjectDetection,
    OmDetTurboProcessor,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    OneFormerImageProcessor,
    OneFormerProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessor,
    OwlViTProcessor,
    ResNetConfig,
    RfDetrConfig,
    RfDetrForObjectDetection,
    RfDetrImageProcessor,
    RTDetrImageProcessor,
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2ImageProcessor,
    Sam2MaskDecoderConfig,
    Sam2Model,
    Sam2PromptEncoderConfig,
    Sam2VisionConfig,
    Sam3Config,
    Sam3ImageProcessor,
    Sam3Model,
    Sam3TrackerConfig,
    Sam3TrackerModel,
    Sam3TrackerVideoConfig,
    Sam3VideoConfig,
    Sam3VideoModel,
    SamConfig,
    SamHQConfig,
    SamHQModel,
    SamImageProcessor,
    SamModel,
    Sapiens2Config,
    Sapiens2ForNormalEstimation,
    Sapiens2ImageProcessor,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    SwinConfig,
    TimmWrapperConfig,
    Tipsv2DptConfig,
    Tipsv2DptForNormalEstimation,
    Tipsv2DptImageProcessor,
    Tipsv2VisionConfig,
)


def photograph(size=(96, 64), seed=0):
    """Smooth random colours: different in every place and for every seed."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (6, 8, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(noise.numpy()).resize(size, Image.Resampling.BICUBIC)


def names(number):
    return {"id2label": {index: f"thing {index}" for index in range(number)}, "num_labels": number}


def dpt_hybrid():
    backbone = BitConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24],
        depths=[1, 1, 1],
        layer_type="bottleneck",
        global_padding="same",
        embedding_dynamic_padding=True,
        num_groups=1,
        out_features=["stage1", "stage2", "stage3"],
    )
    config = DPTConfig(
        is_hybrid=True,
        backbone_config=backbone,
        backbone_featmap_shape=[1, 24, 24, 24],
        neck_ignore_stages=[0, 1],
        readout_type="project",
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 16, 8, 8],
        fusion_hidden_size=8,
        image_size=384,
        patch_size=16,
    )
    return DPTForDepthEstimation(config), DPTImageProcessor()


def depth_anything(**settings):
    backbone = Dinov2Config(
        image_size=28,
        patch_size=14,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_ratio=1,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
        **settings,
    )
    processor = DPTImageProcessor(size={"height": 112, "width": 112}, keep_aspect_ratio=True, ensure_multiple_of=14)
    return DepthAnythingForDepthEstimation(config), processor


def tipsv2():
    backbone = Tipsv2VisionConfig(
        image_size=28,
        patch_size=14,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    config = Tipsv2DptConfig(backbone_config=backbone, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8)
    return Tipsv2DptForNormalEstimation(config), Tipsv2DptImageProcessor(size={"height": 56, "width": 56})


def sapiens2():
    config = Sapiens2Config(
        image_size=[32, 24],
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
        head_config={"upsample_out_channels": [8, 8], "conv_out_channels": [8]},
    )
    return Sapiens2ForNormalEstimation(config), Sapiens2ImageProcessor(size={"height": 32, "width": 24}, do_pad=True)


def mask2former(classes=5):
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            image_size=32,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=16,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        **names(classes),
    )
    processor = Mask2FormerImageProcessor(size={"shortest_edge": 63, "longest_edge": 64}, num_labels=classes)
    return Mask2FormerForUniversalSegmentation(config), processor


def segformer(classes=4):
    config = SegformerConfig(
        hidden_sizes=[8, 8, 8, 8],
        num_attention_heads=[1, 1, 1, 1],
        depths=[1, 1, 1, 1],
        decoder_hidden_size=8,
        **names(classes),
    )
    return SegformerForSemanticSegmentation(config), SegformerImageProcessor(size={"height": 64, "width": 64})


def dfine(classes=7):
    config = DFineConfig(
        backbone_config=HGNetV2Config(
            stem_channels=[3, 8, 8],
            stage_in_channels=[8, 16, 16, 16],
            stage_mid_channels=[8, 8, 8, 8],
            stage_out_channels=[16, 16, 16, 16],
            stage_num_blocks=[1, 1, 1, 1],
            stage_numb_of_layers=[1, 1, 1, 1],
            hidden_sizes=[16, 16, 16, 16],
            embedding_size=16,
            depths=[1, 1, 1, 1],
            out_features=["stage2", "stage3", "stage4"],
            out_indices=[2, 3, 4],
        ),
        encoder_hidden_dim=16,
        encoder_in_channels=[16, 16, 16],
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        feat_strides=[8, 16, 32],
        decoder_in_channels=[16, 16, 16],
        d_model=16,
        hidden_expansion=0.5,
        decoder_layers=2,
        decoder_ffn_dim=16,
        decoder_attention_heads=2,
        num_queries=20,
        num_denoising=0,
        eval_size=None,
        anchor_image_size=None,
        depth_mult=0.34,
        decoder_n_points=[2, 2, 2],
        layer_scale=1.0,
        lqe_hidden_dim=8,
        **names(classes),
    )
    return DFineForObjectDetection(config), RTDetrImageProcessor(size={"height": 64, "width": 64})


def detr(classes=6):
    config = DetrConfig(
        backbone_config=ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 8, 16, 16],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage4"],
        ),
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=12,
        **names(classes),
    )
    return DetrForObjectDetection(config), DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})


def clip_tokenizer():
    """Knows the letters. A text that starts with the token 0 is taken for padding by some models."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens = ["!", "<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[])


def eomt(classes=5):
    config = EomtConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=64,
        patch_size=16,
        mlp_ratio=1,
        num_blocks=1,
        num_queries=6,
        **names(classes),
    )
    processor = EomtImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}, do_pad=True)
    return EomtForUniversalSegmentation(config), processor


def oneformer(classes=5):
    config = OneFormerConfig(
        backbone_config=SwinConfig(
            image_size=32,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        num_queries=8,
        task_seq_len=24,
        text_encoder_width=16,
        text_encoder_context_length=24,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=80,
        text_encoder_n_ctx=2,
        conv_dim=32,
        mask_dim=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=2,
        dim_feedforward=16,
        query_dec_layers=1,
        **names(classes),
    )
    processor = OneFormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    return OneFormerForUniversalSegmentation(config), OneFormerProcessor(processor, clip_tokenizer())


def depth_pro():
    vision = {
        "model_type": "dinov2",
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "mlp_ratio": 1,
    }
    config = DepthProConfig(
        patch_size=32,
        fusion_hidden_size=8,
        intermediate_hook_ids=[3, 1],
        intermediate_feature_dims=[8, 8],
        scaled_images_ratios=[0.5, 1.0],
        scaled_images_overlap_ratios=[0.0, 0.2],
        scaled_images_feature_dims=[8, 8],
        merge_padding_value=0,
        image_model_config=dict(vision),
        patch_model_config=dict(vision),
        fov_model_config=dict(vision),
    )
    return DepthProForDepthEstimation(config), DepthProImageProcessor(size={"height": 64, "width": 64})


def chmv2():
    backbone = {
        "model_type": "dinov3_vit",
        "image_size": 64,
        "patch_size": 16,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 4,
        "num_register_tokens": 1,
        "out_indices": [1, 2, 3, 4],
        "reshape_hidden_states": True,
        "apply_layernorm": True,
        "return_class_token": True,
    }
    config = CHMv2Config(
        backbone_config=backbone,
        post_process_channels=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
        number_output_channels=16,
    )
    return CHMv2ForDepthEstimation(config), CHMv2ImageProcessor(size={"height": 64, "width": 64})


def rf_detr(classes=6):
    backbone = {
        "model_type": "rf_detr_dinov2",
        "image_size": 64,
        "patch_size": 16,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "mlp_ratio": 1,
        "num_register_tokens": 0,
        "out_features": ["stage2", "stage4"],
        "num_windows": 2,
    }
    config = RfDetrConfig(
        backbone_config=backbone,
        d_model=16,
        decoder_ffn_dim=16,
        decoder_layers=1,
        decoder_self_attention_heads=2,
        decoder_cross_attention_heads=2,
        decoder_n_points=2,
        num_queries=12,
        group_detr=1,
        **names(classes),
    )
    return RfDetrForObjectDetection(config), RfDetrImageProcessor(size={"height": 64, "width": 64})


def sam2():
    backbone = Sam2HieraDetConfig(
        hidden_size=8,
        image_size=[64, 64],
        blocks_per_stage=[1, 2, 1, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[4, 4, 4, 4],
        window_positional_embedding_background_size=[4, 4],
        global_attention_blocks=[2],
        mlp_ratio=1.0,
    )
    vision = Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        fpn_hidden_size=32,
    )
    decoder = Sam2MaskDecoderConfig(hidden_size=32, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=16)
    prompts = Sam2PromptEncoderConfig(hidden_size=32, image_size=64)
    config = Sam2Config(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    size = {"height": 64, "width": 64}
    return Sam2Model(config), Sam2ImageProcessor(size=size, mask_size={"height": 16, "width": 16})


def sam(model=SamModel, config=SamConfig, **decoder):
    vision = {
        "hidden_size": 16,
        "output_channels": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 64,
        "window_size": 2,
        "global_attn_indexes": [0],
        "mlp_dim": 16,
        "num_pos_feats": 8,
    }
    prompts = {"hidden_size": 16, "image_size": 64, "mask_input_channels": 4}
    decoder = {"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16, **decoder}
    config = config(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    processor = SamImageProcessor(
        size={"longest_edge": 64},
        pad_size={"height": 64, "width": 64},
        mask_size={"longest_edge": 16},
        mask_pad_size={"height": 16, "width": 16},
    )
    return model(config), processor


def sam_hq():
    return sam(SamHQModel, SamHQConfig, vit_dim=16)


SAM_DECODER = {"hidden_size": 32, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16}


def edgetam():
    backbone = TimmWrapperConfig(
        architecture="test_resnet", model_args={"features_only": True, "out_indices": [0, 1, 2, 3]}
    )
    vision = EdgeTamVisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[192, 48, 32, 32],
        backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
        fpn_hidden_size=32,
    )
    prompts = {"hidden_size": 32, "image_size": 64, "patch_size": 8}
    config = EdgeTamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=SAM_DECODER)
    size = {"height": 64, "width": 64}
    return EdgeTamModel(config), Sam2ImageProcessor(size=size, mask_size={"height": 32, "width": 32})


def sam3_tracker():
    config = Sam3TrackerConfig(**sam3_parts())
    return Sam3TrackerModel(config), sam3_processor()


def sam3_parts():
    vision = {
        "backbone_config": {
            "model_type": "sam3_vit_model",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "window_size": 2,
            "global_attn_indexes": [0],
            "pretrain_image_size": 28,
        },
        "fpn_hidden_size": 32,
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    }
    prompts = {"hidden_size": 32, "image_size": 56, "patch_size": 14}
    return {"vision_config": vision, "prompt_encoder_config": prompts, "mask_decoder_config": SAM_DECODER}


def sam3_processor():
    return Sam3ImageProcessor(size={"height": 56, "width": 56}, mask_size={"height": 16, "width": 16})


def sam3():
    """The model that finds masks by names."""
    part = {"hidden_size": 32, "num_attention_heads": 2}
    layers = {**part, "num_layers": 1, "intermediate_size": 16}
    text = {
        "model_type": "clip_text_model",
        "vocab_size": 80,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 24,
        "projection_dim": 16,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = Sam3Config(
        vision_config=sam3_parts()["vision_config"],
        text_config=text,
        geometry_encoder_config=layers,
        detr_encoder_config=layers,
        detr_decoder_config={**layers, "num_queries": 6},
        mask_decoder_config=part,
    )
    return Sam3Model(config), sam3_processor()


def sam3_video():
    """The model of which facebook/sam3 has the weights."""
    memory = {
        "memory_attention_hidden_size": 32,
        "memory_attention_num_layers": 1,
        "memory_attention_feed_forward_hidden_size": 16,
        "memory_encoder_hidden_size": 32,
        "memory_encoder_output_channels": 16,
        "mask_downsampler_embed_dim": 32,
        "memory_fuser_embed_dim": 32,
        "memory_fuser_num_layers": 1,
        "memory_fuser_intermediate_dim": 32,
    }
    tracker = Sam3TrackerVideoConfig(**sam3_parts(), **memory, image_size=56)
    config = Sam3VideoConfig(detector_config=sam3()[0].config.to_dict(), tracker_config=tracker.to_dict())
    return Sam3VideoModel(config), sam3_processor()


def bert_tokenizer():
    """Knows the letters. The models read BERT's numbers of the full stop and of the special tokens."""
    vocabulary = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
    letters = "abcdefghijklmnopqrstuvwxyz0123456789-"
    vocabulary.update(
        {token: 1030 + number for number, token in enumerate([*letters, *(f"##{own}" for own in letters)])}
    )
    unused = {f"[unused{number}]": number for number in range(1110) if number not in vocabulary.values()}
    return BertTokenizer(vocab=vocabulary | unused)


def grounding_dino(model=MMGroundingDinoForObjectDetection, config=MMGroundingDinoConfig, **settings):
    config = config(
        backbone_config=SwinConfig(
            image_size=32,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=BertConfig(
            vocab_size=1110,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=64,
        ),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=20,
        num_feature_levels=4,
        max_text_len=40,
        **settings,
    )
    processor = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    return model(config), GroundingDinoProcessor(processor, bert_tokenizer())


def original_grounding_dino():
    return grounding_dino(GroundingDinoForObjectDetection, GroundingDinoConfig)


def owlv2(model=Owlv2ForObjectDetection, config=Owlv2Config, processor=Owlv2Processor, images=Owlv2ImageProcessor):
    tokenizer = clip_tokenizer()
    config = config(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 24,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
        },
        projection_dim=16,
    )
    size = {"height": 64, "width": 64}
    return model(config), processor(images(size=size, crop_size=size, do_center_crop=False), tokenizer)


def owlvit():
    return owlv2(OwlViTForObjectDetection, OwlViTConfig, OwlViTProcessor, OwlViTImageProcessor)


def omdet_turbo():
    tokenizer = clip_tokenizer()
    text = {
        "model_type": "clip_text_model",
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 16,
        "max_position_embeddings": 48,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = OmDetTurboConfig(
        text_config=text,
        backbone_config=SwinConfig(
            image_size=64,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_features=["stage2", "stage3", "stage4"],
        ),
        apply_layernorm_after_vision_backbone=False,  # for a backbone of timm
        text_projection_in_dim=16,
        text_projection_out_dim=16,
        class_embed_dim=16,
        num_queries=20,
        encoder_in_channels=[16, 32, 64],
        encoder_hidden_dim=32,
        encoder_attention_heads=2,
        encoder_dim_feedforward=16,
        vision_features_channels=[32, 32, 32],
        task_encoder_hidden_dim=16,
        decoder_hidden_dim=32,  # not that of the text
        decoder_num_heads=2,
        decoder_num_layers=2,
        decoder_dim_feedforward=16,
    )
    processor = DetrImageProcessor(size={"height": 64, "width": 64})
    return OmDetTurboForObjectDetection(config), OmDetTurboProcessor(processor, tokenizer)


def save(make, folder, **settings):
    """Makes the model, each time with the same weights, and saves it; returns the folder."""
    torch.manual_seed(0)
    model, processor = make(**settings)
    with torch.no_grad():
        for module in model.modules():  # at their initial values random heads give nearly the same everywhere
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                module.weight.normal_(0, module.weight[0].numel() ** -0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
