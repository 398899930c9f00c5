"""What an encoder costs: the arithmetic for an image, counted by torch on tensors without content."""

from __future__ import annotations

from .types import Encoder, Tap


def encoder_flops(encoder: Encoder) -> float | None:
    """FLOPs of the matrix products and convolutions for one image at the encoder's own size.

    A multiplication with its addition counts as two, and attention is counted in full whatever kernel runs
    it. Nothing is computed, so that a large encoder takes no longer than a small one.

    Returns:
        The count; None where there is none: no such product, or a module that torch cannot trace without
        values.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    side = encoder.spec.image_size
    counter = FlopCounterMode(display=False)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
            images = torch.empty(1, 3, side, side)
            with counter:
                encoder(images, (Tap(),))
    except Exception:  # noqa: BLE001 - a count that cannot be made must not keep an encoder from its scores
        # A module may look at values, or use what torch cannot trace: it is scored all the same, and reports
        # and `inspect` say "not counted".
        return None
    return float(counter.get_total_flops()) or None
