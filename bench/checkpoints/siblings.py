"""What toolkits keep beside the encoder that they train, and which of several encoders they evaluate.

The names are those of solo-learn, lightly, VISSL, the bolts of Lightning, byol-pytorch and torchmetrics.
"""

from __future__ import annotations

PREFER = (
    *("state_dict_ema", "model_ema", "ema", "teacher", "teacher_backbone"),
    *("backbone", "online_encoder", "online_network", "state_dict", "model"),
)
"""Components of the path of an encoder, the first that one encoder has is taken."""

BESIDE = {
    r"(?:\w+_)?(?:projector|projection|proj|projection_head\w*)": "projection head",
    r"(?:\w+_)?(?:predictor|prediction_head)": "predictor",
    r"(?:\w+_)?(?:heads?|classifier|linear|probe|fc)": "head",
    r"(?:\w+_)?prototypes": "prototypes",
    r"(?:\w+_)?queue(?:_\w+)?": "queue of keys",
    r"(?:\w+_)?decoder": "decoder",
    r"mask_token": "mask token",
    r"(?:\w+_)?(?:criterion|loss|loss_fn|loss_func|optimizer|meters)": "training state",
    r"(?:train|val|valid|test)_\w+": "metric",
    r"(?:momentum|target|student)_\w+|\w+_momentum": "the other network of the pair",
}
"""Patterns of components that are not the encoder's, with the reason."""
