"""Precision and compilation: what Fabric and torch are asked for, as far as a CPU shows it."""

import pytest
import torch
from torch import nn

from lmim_bench.bench.errors import ConfigError
from lmim_bench.pretrain import model as model_module
from lmim_bench.pretrain import step as step_module
from lmim_bench.pretrain.engine import compile_parts, make_fabric, make_optimizer
from lmim_bench.pretrain.model import Fed
from lmim_bench.pretrain.patches import cut_patches
from lmim_bench.pretrain.step import Stepper

# Notices of torch: of what tracing reads, and of Python 3.13.0.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python:RuntimeWarning"),
]


@pytest.fixture
def stepper(tiny):
    """A recipe's stepper on the CPU, with changes."""

    def build(name, *changes):
        recipe = tiny(name, "engine.device=cpu", *changes)
        return Stepper(recipe, make_fabric(recipe.engine))

    return build


@pytest.mark.parametrize(
    ("precision", "called"), [("fp32", "32-true"), ("bf16", "bf16-mixed"), ("fp16", "16-mixed")]
)
def test_the_precision_is_the_one_asked_for_and_its_scaler_is_saved(stepper, fed, precision, called):
    one, other = (stepper("mae", f"engine.precision={precision}") for _ in range(2))
    one(0.5, [Fed(*fed(one.recipe))])
    plugin, fresh = one.fabric.strategy.precision, other.fabric.strategy.precision
    assert plugin.precision == called
    state = plugin.state_dict()
    assert bool(state) == (precision == "fp16"), "fp16 alone scales its loss"
    assert fresh.state_dict() != state or not state
    fresh.load_state_dict(state)
    assert fresh.state_dict() == state


def test_fsdp2_in_fp16_is_refused_in_a_line(tiny):
    recipe = tiny("mae", "engine.device=cpu", "engine.strategy=fsdp2", "engine.precision=fp16")
    with pytest.raises(
        ConfigError, match=r"engine\.strategy=fsdp2 has no loss scaling.*bf16 or fp32"
    ) as caught:
        make_fabric(recipe.engine)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["mae", "latent-mim-lite"])
def test_targets_of_pixels_are_made_in_fp32_whatever_the_precision(
    stepper, fed, monkeypatch, name, precision
):
    compared = []

    def noted(predictions, targets, config):
        compared.append(targets)
        return original(predictions, targets, config)

    original = model_module.reconstruction_loss
    monkeypatch.setattr(model_module, "reconstruction_loss", noted)
    one = stepper(name, f"engine.precision={precision}")
    images, offsets, masks = fed(one.recipe)
    one(0.5, [Fed(images, offsets, masks)])
    expected = one.model.targets(cut_patches(images, 4, offsets), masks)
    assert torch.equal(compared[0], expected)


@pytest.mark.parametrize("fused", [False, True])
def test_in_fp16_gradients_are_clipped_whatever_the_optimiser(stepper, fed, monkeypatch, fused):
    """A fused one is what a GPU has."""
    monkeypatch.setattr(
        step_module, "make_optimizer", lambda model, config, **_: make_optimizer(model, config, fused)
    )
    one = stepper("mae", "engine.precision=fp16", "optim.clip=1e-3")
    one(0.5, [Fed(*fed(one.recipe))])
    moments = [state["exp_avg"].flatten() for state in one.optimizer.state.values()]
    assert torch.cat(moments).norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)  # (1 - beta) * clip


@pytest.fixture
def uncompiled(monkeypatch):
    """Torch traces modules, and runs what it traced without compiling it, which takes far longer."""
    original = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: original(self, backend="eager", **options)
    )


@pytest.mark.usefixtures("uncompiled")
def test_blocks_and_projectors_are_compiled_and_compute_the_same(stepper, fed):
    plain, traced = (stepper("latent-mim", f"engine.compile={on}") for on in ("off", "on"))
    assert (plain.compiled, traced.compiled) == (False, True)
    found = {name for name, part in traced.model.named_modules() if part._compiled_call_impl is not None}
    encoders = {
        f"{encoder}.{part}"
        for encoder in ("encoder", "target_encoder")
        for part in ("vit.blocks.0", "vit.blocks.1", "projector")
    }
    assert found == encoders | {"decoder.blocks.0", "decoder.blocks.1"}
    batch = Fed(*fed(plain.recipe))
    first, second = ([one(0.1, [batch])["loss"].item() for _ in range(3)] for one in (plain, traced))
    assert second == pytest.approx(first, rel=1e-5)
    assert traced.model.state_dict().keys() == plain.model.state_dict().keys()


def test_a_projector_is_traced_whole(tiny, built):
    graphs = []
    projector = built(tiny("latent-mim")).encoder.projector
    x = torch.randn(3, 5, projector[0].in_features)
    expected = projector(x)
    projector.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    torch.testing.assert_close(projector(x), expected)
    (graph,) = graphs
    assert sum(node.op == "call_function" for node in graph.graph.nodes) == len(projector)


@pytest.mark.usefixtures("uncompiled")
def test_an_encoder_without_projector_has_nothing_else_compiled(tiny, built):
    recipe = tiny("mae", "engine.compile=on")
    model = built(recipe)
    assert compile_parts(model, recipe.engine, torch.device("cpu"))
    assert model.encoder.projector._compiled_call_impl is None


@pytest.mark.usefixtures("uncompiled")
def test_many_trainings_of_a_process_do_not_come_to_the_limit_of_recompilations(stepper, fed, monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    for width in (8, 16, 24, 32):
        one = stepper("mae", "engine.compile=on", f"model.embed_dim={width}", f"decoder.width={width}")
        one(0.5, [Fed(*fed(one.recipe))])
