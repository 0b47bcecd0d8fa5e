"""150 networks of timm by name, of 89 of its 98 files, on images as small as each takes."""

from __future__ import annotations

import inspect
import warnings
from functools import partial
from typing import Any

import timm
import torch

from tests.accept.census.tiny import NotBuiltError, Tiny, line, made, runs

PACKAGE = "timm"
FIRST = "test_vit"
CLASSES = 64
# What makes a network small, where it takes it.
_GIVEN: tuple[dict[str, Any], ...] = (
    {"img_size": 64, "depth": 2},
    {"img_size": 64},
    {"img_size": 128},
    {"depth": 2},
    {},
)
_NAMES = """
beit_base_patch16_224 cait_xxs24_224 cait_xxs36_224 coat_lite_tiny coat_tiny convit_small
convit_tiny convmixer_1024_20_ks9_p14 convmixer_768_32 convnext_atto convnext_zepto_rms
convnextv2_atto cpubone_nano cpubone_t0 crossvit_9_240 crossvit_tiny_240 cs3darknet_focus_s
cs3darknet_s csatv2 csatv2_21m cspnext_s cspnext_tiny davit_tiny deit_tiny_distilled_patch16_224
deit_tiny_patch16_224 densenet121 densenetblur121d dla46_c dla46x_c dpn48b dpn68
eca_botnext26ts_256 edgenext_x_small edgenext_xx_small efficientformer_l1 efficientformerv2_s0
efficientformerv2_s1 efficientnet_b0 efficientnet_lite0 efficientvim_m1 efficientvit_b0
efficientvit_b1 efficientvit_m0 efficientvit_m1 ese_vovnet19b_slim ese_vovnet19b_slim_dw
eva02_tiny_patch14_224 fasternet_t0 fasternet_t1 fastvit_t12 fastvit_t8 focalnet_tiny_srf
gcvit_xtiny gcvit_xxtiny gemma4_vit_167m ghostnet_050 ghostnetv3_050 gmixer_12_224 gmlp_ti16_224
halonet_h1 hardcorenas_a hgnetv2_b0 hgnetv2_b1 hiera_tiny_224 hrnet_w18_small iformer_s iformer_t
inception_next_atto inception_v3 lcnet_035 lcnet_050 lcnetv2_small legacy_seresnet18
legacy_xception levit_128s levit_conv_128s lowformer_b0 mambaout_femto mixnet_s
mobilenetv3_small_050 mobilenetv4_conv_small_035 mobileone_s0 mobileone_s1 mobilevit_xs
mobilevit_xxs mobilevitv2_050 mvitv2_tiny naflexvit_base_patch16_gap nest_tiny nextvit_small
nf_regnet_b0 pit_ti_224 pit_ti_distilled_224 poolformer_s12 pvt_v2_b0 qwen3_vit_88m rdnet_tiny
regnetx_002 regnety_002 regnety_004 repghostnet_050 repghostnet_058 repvit_m0_9 repvit_m1
res2net50_14w_8s resnest14d resnet10t resnet14t resnetv2_18 rexnet_100 rexnetr_100 sam2_hiera_tiny
samvit_base_patch16_224 sequencer2d_s shvit_s1 shvit_s2 skresnet18 starnet_s050 starnet_s1
starnet_s100 swiftformer_s swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224
swinv2_tiny_window16_256 test_coatnet test_convnext test_convnext2 test_convnext3 test_mambaout
test_maxvit test_nfnet test_vit test_vit2 test_vit3 test_vit4 test_vit_relpos tiny_vit_5m_224
tnt_s_patch16_224 twins_pcpvt_small visformer_tiny vit_srelpos_small_patch16_224
vit_tiny_patch16_224 vit_tiny_patch16_dinov3_qkvb vit_tiny_r_s16_p8_224 vitamin_small_224
volo_d1_224 xception41 xcit_nano_12_p16_224 xcit_nano_12_p8_224
"""


def names() -> list[str]:
    """Small ones of most files of `timm.models` in 1.0.31."""
    return sorted(_NAMES.split())


def build(name: str, seed: int = 0) -> Tiny:
    """The network for `CLASSES` classes on two images of the smallest side that it takes.

    Raises:
        NotBuiltError: it takes none.
    """
    warnings.simplefilter("ignore")
    causes: list[str] = []
    generator = torch.Generator().manual_seed(1)
    for given in _GIVEN:
        make = partial(timm.create_model, name, num_classes=CLASSES, **given)
        try:
            model = made(make, seed)
        except NotBuiltError:
            raise
        except Exception as error:
            causes.append(f"model: {line(error)}")
            continue
        own = timm.get_pretrained_cfg(name)
        first = next(iter(inspect.signature(model.forward).parameters))
        given_side = given.get("img_size")
        for side in (given_side,) if given_side else (64, 128, own.input_size[-1] if own else 224):
            inputs = {first: torch.randn(2, 3, side, side, generator=generator)}
            if cause := runs(model, inputs):
                causes.append(cause)
            else:
                tier = ", ".join([f"{side} px", *("depth 2" for _ in given.keys() & {"depth"})])
                return Tiny(model, inputs, tier, partial(made, make, seed + 1))
    raise NotBuiltError(causes[-1])
