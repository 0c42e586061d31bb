"""
The architectures of the known models, without weights, for tables of their sizes and for measurements.

Each entry of `ARCHITECTURES` returns a model and its image processor. Call it with `torch.device("meta")` to allocate
nothing.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import transformers


Architecture = tuple[transformers.PreTrainedModel, Any]  # a model and its processor


def classes(number: int) -> dict[str, Any]:
    return {"id2label": {index: f"class {index}" for index in range(number)}, "num_labels": number}


def dpt_hybrid() -> Architecture:
    """The configuration of dpt_hybrid-midas-501f0c75.pt in transformers' conversion script; 490 MB on the Hub."""
    config = transformers.DPTConfig(
        is_hybrid=True,
        hidden_size=768,
        neck_hidden_sizes=[256, 512, 768, 768],
        reassemble_factors=[1, 1, 1, 0.5],
        backbone_out_indices=[2, 5, 8, 11],
        readout_type="project",
    )
    return transformers.DPTForDepthEstimation(config), transformers.DPTImageProcessor()


def depth_anything_small() -> Architecture:
    """DINOv2-S with a DPT head of 48 to 384 channels; 99.2 MB on the Hub."""
    config = transformers.DepthAnythingConfig(
        backbone_config=transformers.Dinov2Config(
            image_size=518,
            patch_size=14,
            hidden_size=384,
            num_attention_heads=6,
            out_indices=[3, 6, 9, 12],
            reshape_hidden_states=False,
        ),
        reassemble_hidden_size=384,
        neck_hidden_sizes=[48, 96, 192, 384],
        fusion_hidden_size=64,
    )
    processor = transformers.DPTImageProcessor(
        size={"height": 518, "width": 518}, keep_aspect_ratio=True, ensure_multiple_of=14
    )
    return transformers.DepthAnythingForDepthEstimation(config), processor


def tipsv2_normals() -> Architecture:
    """The defaults are google/tipsv2-b14-dpt. It has three heads; only the one for normals is loaded."""
    config = transformers.Tipsv2DptConfig()
    return transformers.Tipsv2DptForNormalEstimation(config), transformers.Tipsv2DptImageProcessor()


def mask2former(
    embed_dim: int, depths: list[int], num_heads: list[int], window_size: int, image_size: int, num_queries: int
) -> Architecture:
    """From Mask2Former's configuration files; Swin-L is `maskformer2_swin_large_IN21k_384_bs16_100ep`, 866 MB."""
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(
            image_size=image_size,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            window_size=window_size,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        num_queries=num_queries,
        **classes(133),
    )
    return transformers.Mask2FormerForUniversalSegmentation(config), transformers.Mask2FormerImageProcessor()


def dfine_xlarge(num_classes: int) -> Architecture:
    """dfine_x_obj365 in transformers' conversion script with 366 classes, dfine_x_coco with 80; 252 MB on the Hub."""
    config = transformers.DFineConfig(
        backbone_config=transformers.HGNetV2Config(
            stem_channels=[3, 32, 64],
            stage_in_channels=[64, 128, 512, 1024],
            stage_mid_channels=[64, 128, 256, 512],
            stage_out_channels=[128, 512, 1024, 2048],
            stage_num_blocks=[1, 2, 5, 2],
            out_indices=[2, 3, 4],
        ),
        encoder_in_channels=[512, 1024, 2048],
        encoder_hidden_dim=384,
        encoder_ffn_dim=2048,
        decoder_in_channels=[384, 384, 384],
        decoder_n_points=[3, 6, 3],
        **classes(num_classes),
    )
    return transformers.DFineForObjectDetection(config), transformers.RTDetrImageProcessor()


def rtdetr_v2_r18() -> Architecture:
    """ResNet-18 with three decoder layers, COCO; 20.2 million parameters."""
    config = transformers.RTDetrV2Config(
        backbone_config=transformers.RTDetrResNetConfig(
            depths=[2, 2, 2, 2],
            hidden_sizes=[64, 128, 256, 512],
            layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        ),
        encoder_in_channels=[128, 256, 512],
        decoder_layers=3,
        hidden_expansion=0.5,
        **classes(80),
    )
    return transformers.RTDetrV2ForObjectDetection(config), transformers.RTDetrImageProcessor()


def segformer_b0() -> Architecture:
    """The defaults with the 150 classes of ADE20K; 15 MB on the Hub."""
    config = transformers.SegformerConfig(**classes(150))
    return transformers.SegformerForSemanticSegmentation(config), transformers.SegformerImageProcessor()


def eomt_large() -> Architecture:
    """The defaults are tue-mps/coco_panoptic_eomt_large_640: a ViT-L/16 at 640 pixels, 133 classes."""
    config = transformers.EomtConfig(**classes(133))
    return transformers.EomtForUniversalSegmentation(config), transformers.EomtImageProcessor(do_pad=True)


def oneformer_swin_tiny() -> Architecture:
    """The defaults are shi-labs/oneformer_ade20k_swin_tiny, 150 classes."""
    config = transformers.OneFormerConfig(**classes(150))
    return transformers.OneFormerForUniversalSegmentation(config), transformers.OneFormerImageProcessor()


def depth_pro() -> Architecture:
    """Three DINOv2-L: for the image, for its parts and for the angle of view."""
    vision = {
        "model_type": "dinov2",
        "image_size": 384,
        "patch_size": 16,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    config = transformers.DepthProConfig(
        use_fov_model=True,
        image_model_config=dict(vision),
        patch_model_config=dict(vision),
        fov_model_config=dict(vision),
    )
    return transformers.DepthProForDepthEstimation(config), transformers.DepthProImageProcessor()


def chmv2() -> Architecture:
    """The defaults are facebook/dinov3-vitl16-chmv2-dpt-head, on a DINOv3 ViT-L/16."""
    return transformers.CHMv2ForDepthEstimation(transformers.CHMv2Config()), transformers.CHMv2ImageProcessor()


def rf_detr_base() -> Architecture:
    """The defaults are Roboflow/rf-detr-base, with the 91 numbers of COCO's classes."""
    config = transformers.RfDetrConfig(**classes(91))
    return transformers.RfDetrForObjectDetection(config), transformers.RfDetrImageProcessor()


def mm_grounding_dino_tiny() -> Architecture:
    """The defaults: Swin-T and BERT-base. The tokenizer only knows letters; it stands for BERT's."""
    vocabulary = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012}
    for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz"):
        vocabulary |= {letter: 2000 + index, f"##{letter}": 2100 + index}
    unused = set(range(2200)) - set(vocabulary.values())
    tokenizer = transformers.BertTokenizer(vocab=vocabulary | {f"[unused{number}]": number for number in unused})
    processor = transformers.GroundingDinoProcessor(transformers.GroundingDinoImageProcessor(), tokenizer)
    return transformers.MMGroundingDinoForObjectDetection(transformers.MMGroundingDinoConfig()), processor


SWIN_LARGE = (192, [2, 2, 18, 2], [6, 12, 24, 48], 12, 384, 200)
SWIN_TINY = (96, [2, 2, 6, 2], [3, 6, 12, 24], 7, 224, 100)
ARCHITECTURES: dict[str, Callable[[], Architecture]] = {
    "Intel/dpt-hybrid-midas": dpt_hybrid,
    "depth-anything/Depth-Anything-V2-Small-hf": depth_anything_small,
    "google/tipsv2-b14-dpt": tipsv2_normals,
    "facebook/mask2former-swin-large-coco-panoptic": partial(mask2former, *SWIN_LARGE),
    "facebook/mask2former-swin-tiny-coco-panoptic": partial(mask2former, *SWIN_TINY),
    "nvidia/segformer-b0-finetuned-ade-512-512": segformer_b0,
    "ustc-community/dfine-xlarge-obj365": partial(dfine_xlarge, 366),
    "ustc-community/dfine-xlarge-coco": partial(dfine_xlarge, 80),
    "PekingU/rtdetr_v2_r18vd": rtdetr_v2_r18,
    "Roboflow/rf-detr-base": rf_detr_base,
    "openmmlab-community/mm_grounding_dino_tiny_o365v1_goldg_v3det": mm_grounding_dino_tiny,
    "tue-mps/coco_panoptic_eomt_large_640": eomt_large,
    "shi-labs/oneformer_ade20k_swin_tiny": oneformer_swin_tiny,
    "apple/DepthPro-hf": depth_pro,
    "facebook/dinov3-vitl16-chmv2-dpt-head": chmv2,
}
