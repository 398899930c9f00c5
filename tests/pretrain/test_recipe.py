import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmim_bench.bench.errors import CheckpointError, ConfigError
from lmim_bench.bench.vit import build_vit
from lmim_bench.pretrain.api import without_effect
from lmim_bench.pretrain.recipe import (
    SECTIONS,
    Recipe,
    idle_fields,
    load_recipe,
    make_recipe,
    named_fields,
    recipe_names,
)
from lmim_bench.pretrain.schedules import momentum
from lmim_bench.pretrain.sections import ARCHITECTURES, ModelConfig

NAMES = ["data2vec", "i-jepa", "latent-mim", "latent-mim-lite", "latent-mim-naive", "mae"]


def test_the_built_in_recipes_are_there():
    assert recipe_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_loads_under_its_name_and_survives_its_own_json(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.about
    assert make_recipe(json.loads(recipe.model_dump_json())) == recipe
    assert recipe.spec().image_size == 224


def test_the_final_choices_are_those_of_the_papers():
    latent = load_recipe("latent-mim")
    assert (latent.grid, latent.cell, latent.crop_size, latent.visible_patches) == (14, 20, 280, 20)
    assert (latent.target.kind, latent.target.momentum, latent.objective.tau) == ("ema", 0.99, 0.2)
    mae = load_recipe("mae")
    assert (mae.crop_size, mae.visible_patches, mae.latent, mae.decoder.depth) == (224, 49, False, 8)
    data2vec = load_recipe("data2vec")
    assert (data2vec.visible_patches, data2vec.target.top_blocks, data2vec.objective.beta) == (76, 6, 2.0)
    assert {momentum(data2vec.target, done) for done in (0, 0.5, 1)} == {0.9998}
    jepa = load_recipe("i-jepa")
    assert (jepa.masking.blocks, jepa.target.momentum, jepa.spec().has_cls) == (4, 0.996, False)
    assert [name for name in NAMES if load_recipe(name).target.export == "target"] == ["i-jepa"]
    assert load_recipe("latent-mim-naive").target.kind == "shared"
    assert load_recipe("latent-mim-lite").target.kind == "projection"


@pytest.mark.parametrize("kind", ["pixels", "projection", "shared", "stop_gradient", "ema", "frozen"])
def test_targets_that_an_encoder_makes_are_latent(kind):
    assert make_recipe({"target": {"kind": kind}}).latent == (kind not in ("pixels", "projection"))


@pytest.mark.parametrize("arch", list(ARCHITECTURES))
def test_an_architecture_gives_the_shape_unless_fields_do(arch):
    assert ModelConfig(arch=arch).shape == ARCHITECTURES[arch]
    assert ModelConfig(arch=arch, depth=3).shape == (ARCHITECTURES[arch][0], 3, ARCHITECTURES[arch][2])
    assert ModelConfig(arch=arch, embed_dim=24, num_heads=2).shape == (24, ARCHITECTURES[arch][1], 2)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(grid=st.integers(2, 20), share=st.floats(0.01, 0.99))
def test_visible_is_a_share_below_one_and_a_number_from_one_on(grid, share):
    total = grid**2
    size = {"model": {"patch_size": 2}, "data": {"image_size": 2 * grid}, "objective": {"loss": "mse"}}
    if int(total * share) < 1:
        with pytest.raises(ConfigError, match="leaves 0 of"):
            make_recipe({**size, "masking": {"visible": share}})
    else:
        found = make_recipe({**size, "masking": {"visible": share}}).visible_patches
        assert found == int(total * share + 1e-9)
    for number in (1, total - 1):
        assert make_recipe({**size, "masking": {"visible": number}}).visible_patches == number


def test_a_share_of_patches_loses_none_to_binary_fractions():
    size = {"model": {"patch_size": 2}, "data": {"image_size": 20}}
    assert make_recipe({**size, "masking": {"visible": 0.29}}).visible_patches == 29


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("seed=99999999999999999999", "seed"),
        ("masking.visible=inf", "visible"),
        ("optim.epochs=inf", "epochs"),
        ("optim.base_lr=nan", "base_lr"),
        ("data.mean=nan,0,0", "mean"),
        ("data.aspect=2,0.5", "name the smaller one first"),
        ("masking.visible=195", "hides one; hide more"),
        ("watch.knn_test=1", "knn_test"),
    ],
)
def test_what_no_training_can_use_is_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        load_recipe("latent-mim", [change])


def test_spec_builds_the_encoder_that_the_recipe_declares():
    sets = [
        "model.embed_dim=24",
        "model.depth=2",
        "model.num_heads=2",
        "model.patch_size=8",
        "model.registers=2",
    ]
    recipe = load_recipe("latent-mim", [*sets, "data.image_size=32", "data.mean=0.1,0.2,0.3"])
    spec = recipe.spec()
    assert (spec.family, spec.pooling, spec.final_norm, spec.has_cls) == ("lmim-bench", "mean", False, True)
    assert (spec.embed_dim, spec.depth, spec.patch_size, spec.image_size) == (24, 2, 8, 32)
    assert spec.mean == (0.1, 0.2, 0.3)
    vit = build_vit(spec.arch)
    assert vit.pos_embed.shape == (1, 3 + 16, 24)
    assert len(vit.blocks) == 2
    assert vit.blocks[0].attn.num_heads == 2
    assert type(spec).model_validate_json(spec.model_dump_json()) == spec


def test_settings_of_the_command_line():
    sets = ["seed=7", "model.depth=3", "optim.clip=2.5", "optim.betas=0.8,0.9", "objective.num-negatives=5"]
    recipe = load_recipe("mae", [*sets, "data.flip=false", "optim.no_decay=bias,norm", "engine.compile=off"])
    assert (recipe.seed, recipe.model.depth, recipe.optim.clip, recipe.optim.betas) == (7, 3, 2.5, (0.8, 0.9))
    assert (recipe.objective.num_negatives, recipe.data.flip) == (5, False)
    assert (recipe.optim.no_decay, recipe.engine.compile) == (("bias", "norm"), "off")
    assert recipe.target.kind == "pixels", "what is not named stays as the recipe has it"
    assert load_recipe("data2vec", ["optim.clip=none"]).optim.clip is None
    assert load_recipe("mae", ["model.depth=3", "model.depth=4"]).model.depth == 4


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 3\nmodel: {depth: 2}\nengine: {compile: off}\noptim: {base_lr: 1e-3}\n")
    recipe = load_recipe(str(path), ["model.registers=1"])
    assert (recipe.name, recipe.seed, recipe.model.depth, recipe.model.registers) == ("mine", 3, 2, 1)
    assert (recipe.engine.compile, recipe.optim.base_lr) == ("off", 1e-3)
    path.write_text("name: other\n")
    assert load_recipe(str(path)).name == "other"


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["modle.depth=2"], "a recipe has no section 'modle'. Did you mean 'model'?"),
        (["name.x=2"], "a recipe has no section 'name'. "),
        (["model.dept=2"], "recipe.mae.model has no field 'dept'. Did you mean 'depth'?"),
        (["depth=2"], "--set takes SECTION.FIELD=VALUE (model.depth=6), got 'depth=2'"),
        (["model.depth"], "--set takes SECTION.FIELD=VALUE (model.depth=6), got 'model.depth'"),
        (["seed.x=2"], "--set takes SECTION.FIELD=VALUE"),
        (["model.depth=two"], "recipe.mae.model.depth: "),
        (["model.arch=vit_giant"], "recipe.mae.model.arch: "),
        (["seed=-1"], "recipe.mae.seed: "),
    ],
)
def test_wrong_settings_are_named(sets, message):
    with pytest.raises(ConfigError) as caught:
        load_recipe("mae", sets)
    assert str(caught.value).startswith(message)


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"no recipe 'latent-mem'\. Did you mean 'latent-mim'\?"):
        load_recipe("latent-mem")
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        load_recipe(str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize("text", ["- 1", "{", "modle: {}", "model: {dept: 1}", "model: 3", "optim:"])
@pytest.mark.parametrize("sets", [[], ["model.depth=2", "optim.batch_size=8"]])
def test_files_that_are_no_recipe_are_refused_in_one_line(tmp_path, text, sets):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(path), sets)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": {"image_size": 225}}, "data.image_size 225 is not a multiple of model.patch_size 16"),
        ({"data": {"image_size": 8}}, "data.image_size 8 is not a multiple of model.patch_size 16"),
        ({"model": {"num_heads": 5}}, "model.num_heads 5 does not divide the width 768"),
        ({"decoder": {"num_heads": 5}}, "decoder.num_heads 5 does not divide the width 512"),
        (
            {"model": {"embed_dim": 30, "num_heads": 2}},
            "the width 30 of the model is not a multiple of 4, which positions need",
        ),
        (
            {"decoder": {"width": 6, "num_heads": 2}},
            "the width 6 of the decoder is not a multiple of 4, which positions need",
        ),
        (
            {"masking": {"visible": 0.001}},
            "masking.visible 0.001 leaves 0 of 196 patches visible; at least one",
        ),
        (
            {"masking": {"visible": 196}},
            "masking.visible 196.0 leaves 196 of 196 patches visible; at least one",
        ),
        ({"masking": {"kind": "multiblock"}}, "masking.kind multiblock needs target.sees=all"),
        ({"model": {"class_token": False, "pooling": "cls"}}, "model.pooling asks for a class token"),
        ({"model": {"class_token": False, "pooling": "cls+mean"}}, "model.pooling asks for a class token"),
        (
            {"target": {"top_blocks": 13}, "projector": {"depth": 0}},
            "target.top_blocks 13 is more than the encoder's blocks",
        ),
        (
            {"target": {"top_blocks": 2}},
            "target.top_blocks averages blocks of the encoder; set projector.depth=0",
        ),
    ],
)
def test_what_does_not_go_together_is_said(fields, message):
    with pytest.raises(ConfigError) as caught:
        make_recipe(fields)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("loss", ["infonce", "mse"])
def test_the_similarity_constraint_is_refused_for_pixels_whatever_the_loss(loss):
    with pytest.raises(
        ConfigError, match=r"similarity_weight is for latent targets, and target\.kind is pixels"
    ):
        make_recipe({"target": {"kind": "pixels"}, "objective": {"loss": loss, "similarity_weight": 0.1}})


def test_every_section_can_be_set_and_every_field_is_described():
    assert set(SECTIONS) == set(Recipe.model_fields) - {"name", "about", "seed"}
    for section in SECTIONS:
        for name, field in type(getattr(Recipe(), section)).model_fields.items():
            assert field.description, f"{section}.{name}"


def test_numbers_that_make_no_encoder_are_a_checkpoint_error():
    broken = Recipe().model_copy(
        update={"model": ModelConfig.model_construct(**{**ModelConfig().model_dump(), "num_heads": 7})}
    )
    with pytest.raises(CheckpointError, match="num_heads"):
        broken.spec()


@pytest.mark.parametrize("name", recipe_names())
def test_fields_said_to_be_idle_change_no_loss_and_others_are_not_said_to_be(name, tiny, built, fed):
    """Every field of a method is changed in turn: the loss or the masks move, or the field is idle."""
    others = {
        "projector": {"hidden_dim": 20},
        "target": {"sees": "all", "normalise": True, "norm_pixels": False},
        "masking": {"visible": 0.5, "blocks": 2, "block_scale": (0.4, 0.5)},
        "objective": {
            "beta": 0.3,
            "tau": 0.5,
            "standardise": False,
            "negatives": "batch",
            "num_negatives": 2,
        },
    }
    sets = ("masking.gap=2",) if name.startswith("latent-mim") else ()
    recipe = tiny(name, *sets)
    idle = idle_fields(recipe)

    def outcome(changed):
        given = fed(changed)
        model = built(changed)
        loss = model(*given, 0.5).loss.item()
        offsets = None if given.offsets is None else given.offsets.tolist()
        return loss, given.masks.visible.tolist(), given.masks.hidden.tolist(), offsets

    before = outcome(recipe)
    for section, fields in others.items():
        for field, value in fields.items():
            path = f"{section}.{field}"
            part = getattr(recipe, section)
            if getattr(part, field) == value:
                value = {"all": "masked", True: False, False: True}[value]
            try:
                changed = Recipe.model_validate(
                    {**recipe.model_dump(), section: {**part.model_dump(), field: value}}
                )
            except ValueError:
                continue  # does not go together
            assert (outcome(changed) == before) == (path in idle), path


def test_idle_fields_follow_what_makes_them_so():
    assert "target.momentum" in idle_fields(load_recipe("latent-mim", ["target.kind=frozen"]))
    assert "target.momentum" not in idle_fields(load_recipe("latent-mim"))
    assert idle_fields(load_recipe("mae"))["target.sees"] == "target.kind is pixels"
    assert idle_fields(load_recipe("mae", ["optim.steps=3"]))["optim.epochs"] == "optim.steps is given"
    assert "target.momentum_end" in idle_fields(load_recipe("latent-mim", ["target.momentum_curve=constant"]))


def test_idle_fields_of_a_users_own_file_are_named_and_those_of_a_built_in_recipe_are_not(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("masking: {block_scale: [0.3, 0.4]}\nobjective: {loss: mse, tau: 0.5}\n")
    recipe = load_recipe(str(mine), ["optim.steps=3"])
    named = named_fields(str(mine), recipe, ["optim.steps=3"])
    assert [line.split()[0] for line in without_effect(recipe, named)] == [
        "masking.block_scale",
        "objective.tau",
    ]
    recipe = load_recipe("mae", ["optim.steps=3"])
    assert without_effect(recipe, named_fields("mae", recipe, ["optim.steps=3"])) == []


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["masking.visible=1.5"], "neither a share below 1 nor a number of patches"),
        (["masking.block_scale=0.2,0.1"], "name the smaller one first"),
        (
            ["target.kind=frozen", "target.export=target"],
            "target.export=target keeps the moving average of the encoder, and target.kind frozen has none; "
            "set target.export=online",
        ),
        (["engine.precision=bfloat16"], "'auto', 'fp32', 'bf16' or 'fp16'"),
        (
            ["masking.kind=multiblock", "target.sees=all", "objective.negatives=batch"],
            "same patch of an overlapping block",
        ),
        (
            ["masking.kind=multiblock", "target.sees=all", "data.image_size=64"],
            "on 4 x 4 patches may be of one; set a larger masking.block_scale",
        ),
    ],
)
def test_what_a_recipe_refuses_by_name(sets, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_recipe("latent-mim", sets)
