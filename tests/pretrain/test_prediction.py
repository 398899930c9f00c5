"""Hidden patches: measures against slow statements, models known to be right or wrong, and whole runs."""

from __future__ import annotations

import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lmim_bench.bench.api import make_config, run
from lmim_bench.bench.config import CheckpointConfig, RunConfig
from lmim_bench.bench.data.embedded import Sizes, generate
from lmim_bench.bench.errors import CheckpointError, ConfigError, TaskError
from lmim_bench.bench.opening import open_run
from lmim_bench.bench.plan import make_plan
from lmim_bench.bench.progress import Reporter
from lmim_bench.bench.types import Dataset
from lmim_bench.pretrain.api import pretrain
from lmim_bench.pretrain.objectives import reconstruction_loss
from lmim_bench.pretrain.patches import standardise
from lmim_bench.pretrain.prediction import TASK, _distances
from lmim_bench.pretrain.retrieval import directions, mean_pair_cosine, pixel_errors, retrieve
from lmim_bench.pretrain.sections import ObjectiveConfig
from lmim_bench.pretrain.trained import Trained, load_trained

CASES = settings(deadline=None, derandomize=True, max_examples=40)
SEEDS = st.integers(0, 9999)
NAME = "hidden_patches"


def units(seed, *shape):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# ------------------------------------------------------------------------------------------- measures


@CASES
@given(SEEDS, st.integers(1, 4), st.integers(2, 4), st.booleans())
def test_retrieval_equals_a_loop_over_tokens(seed, hidden, images, tied):
    rng = np.random.default_rng(seed)
    places = np.concatenate([rng.permutation(5)[:hidden] for _ in range(images)])
    tokens = units(seed, images * hidden, 3)
    if tied:
        tokens = tokens[rng.integers(0, len(tokens), len(tokens))]
    image = int(rng.integers(images))
    first, last = image * hidden, (image + 1) * hidden
    own = rng.integers(first, last, 6)
    cosines = units(seed + 1, 6, 3) @ tokens.T
    found = retrieve(cosines, torch.from_numpy(own), torch.from_numpy(places), first, last)
    others = [c for c in range(len(tokens)) if not first <= c < last]
    for i, row in enumerate(cosines.tolist()):
        best = max(row[first:last])
        near = [c for c in range(first, last) if row[c] > best - 1e-6]
        assert found.hits[i] == pytest.approx(1 / len(near) if own[i] in near else 0)
        rivals = [row[c] for c in others if places[c] == places[own[i]]]
        won = [0.5 if abs(r - row[own[i]]) <= 1e-6 else float(r < row[own[i]]) for r in rivals]
        assert found.ahead[i] == pytest.approx(np.mean(won) if won else 0.5)
        assert int(found.nearest[i]) in others
        assert row[int(found.nearest[i])] == max(row[c] for c in others)


@pytest.mark.parametrize("standardised", [True, False])
def test_cosines_are_those_that_patch_discrimination_compares(standardised):
    config = ObjectiveConfig(loss="infonce", standardise=standardised, tau=0.3)
    predictions, targets = 3 * units(0, 2, 5, 7) + 1, units(1, 2, 5, 7)
    asked, answer = directions(predictions, targets, config)
    logits = asked @ answer.transpose(1, 2) / config.tau
    loss = 2 * config.tau * -logits.log_softmax(-1).diagonal(dim1=1, dim2=2).mean()
    assert float(loss) == pytest.approx(float(reconstruction_loss(predictions, targets, config)), rel=1e-5)


@pytest.mark.parametrize(("loss", "prepared"), [("mse", lambda x: x), ("norm_l2", standardise)])
def test_cosines_of_a_regression_standardise_what_it_regresses_on(loss, prepared):
    predictions, targets = units(0, 2, 5, 7) + 1, units(1, 2, 5, 7) + 2
    asked, answer = directions(predictions, targets, ObjectiveConfig(loss=loss))
    expected = F.cosine_similarity(predictions, prepared(targets), dim=-1)
    torch.testing.assert_close((asked * answer).sum(-1), expected)


def test_pixel_errors_equal_a_loop_with_the_mean_colour_of_what_is_seen():
    rng = np.random.default_rng(0)
    predictions, targets = rng.normal(size=(2, 2, 3, 12))
    visible = rng.normal(size=(2, 4, 12))
    found = pixel_errors(*map(torch.from_numpy, (predictions, targets, visible)))
    for b in range(2):
        colours = visible[b].reshape(-1, 3).mean(axis=0)
        guess = np.tile(colours, 4)
        expected = [np.mean((x - targets[b]) ** 2) for x in (predictions[b], guess)]
        np.testing.assert_allclose(found[b].numpy(), expected)
    flat = pixel_errors(torch.from_numpy(predictions), torch.from_numpy(targets), None)
    np.testing.assert_allclose(flat[:, 1].numpy(), np.square(targets).mean(axis=(1, 2)))


@CASES
@given(SEEDS, st.integers(2, 6))
def test_the_mean_cosine_of_pairs_equals_a_loop(seed, count):
    x = units(seed, count, 4)
    pairs = [float(x[i] @ x[j]) for i in range(count) for j in range(count) if i != j]
    assert float(mean_pair_cosine(x)) == pytest.approx(np.mean(pairs), abs=1e-6)


def test_the_mean_cosine_of_one_token_is_one():
    assert float(mean_pair_cosine(units(0, 1, 4))) == 1


# ------------------------------------------------------------------------------------------- known models


def noise(i):
    """An image like no other."""
    return np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)


@pytest.fixture
def context(toy):
    """A Context over images, by default of noise; made by (seed, number of images, position -> image)."""

    class Split(toy.ToySplit):
        def image(self, i):
            return self.draw(i)

    def call(seed=0, count=40, draw=noise):
        split = Split([f"{i}.png" for i in range(count)], None)
        split.draw = draw
        data = Dataset("noise", "classification", "noise", splits={"val": split})
        return toy.ToyContext(toy.toy_spec(), data, {}, seed)

    return call


@pytest.fixture
def outcome(monkeypatch, context, toy, built):
    """What the task finds where the model of a recipe predicts ``predict(targets, masks)``."""

    def call(recipe, predict=None, targets=None, seed=0, draw=noise, **options):
        model = built(recipe)
        if predict is not None:
            true = targets or model.targets

            def answer(patches, masks):
                found = true(patches, masks)
                shape = (-1, masks.hidden.shape[-1], found.shape[-1])
                return None, predict(found.reshape(shape), masks).reshape(shape)

            moved = SimpleNamespace(predict=answer, targets=true)
            moved.to = lambda device: moved
            model = moved
        trained = Trained(recipe, model, 7)
        monkeypatch.setattr("lmim_bench.pretrain.trained.load_trained", lambda reference: trained)
        ctx = context(seed, draw=draw)
        found = ctx.run(TASK, crop_pct=1.0, **options)
        return ctx, {name: toy.value(m) for name, m in found.items()}, found

    return call


def by_place(patches, masks):
    """Targets that depend on the place alone."""
    codes = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    return codes[masks.hidden.flatten(1)]


RECIPES = ["mae", "latent-mim", "latent-mim-naive", "latent-mim-lite", "i-jepa", "data2vec"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_model_that_is_always_right_reaches_the_top(outcome, tiny, name):
    recipe = tiny(name, "objective.standardise=false")
    ctx, values, found = outcome(recipe, lambda targets, masks: 2 * targets)
    assert values["retrieval"] == pytest.approx(1)
    assert values["content"] == pytest.approx(1)
    assert found["content"].chance == 0.5
    assert values["same_place"] < 0.7
    assert ctx.notes[0].startswith(f"decoder of step 7 by the recipe {name}: ")


@pytest.mark.parametrize("name", RECIPES)
def test_a_model_that_always_says_the_same_is_at_chance(outcome, tiny, name):
    recipe = tiny(name, "objective.standardise=false")
    _, values, found = outcome(recipe, lambda targets, masks: torch.ones_like(targets))
    assert values["content"] == pytest.approx(0.5, abs=0.03)
    expected = found["retrieval"].chance
    assert values["retrieval"] == pytest.approx(expected, abs=1e-9 if name != "i-jepa" else 0.1)


def test_a_code_of_position_retrieves_all_and_knows_no_content(outcome, tiny):
    ctx, values, found = outcome(tiny("latent-mim-naive"), lambda targets, masks: targets, by_place)
    assert values["retrieval"] == 1
    assert values["same_place"] == 1
    assert values["content"] == 0.5
    assert found["same_place"].chance == pytest.approx(1 / 16, abs=0.02)
    assert any(note.startswith("WARNING: the predictions are a code of position") for note in ctx.notes)


def test_targets_that_are_all_the_same_are_at_chance_and_said(outcome, tiny):
    def same(patches, masks):
        return torch.ones(*masks.hidden.flatten(1).shape, 16)

    ctx, values, found = outcome(tiny("latent-mim-naive"), lambda targets, masks: targets, same)
    assert values["content"] == 0.5
    assert values["retrieval"] == pytest.approx(found["retrieval"].chance)
    assert any(note.startswith("WARNING: the targets of an image are nearly the same") for note in ctx.notes)


@pytest.mark.parametrize("normed", ["true", "false"])
def test_right_pixels_give_the_image_back_and_explain_all_of_it(outcome, tiny, normed):
    recipe = tiny("mae", f"target.norm_pixels={normed}")
    ctx, values, _ = outcome(recipe, lambda targets, masks: targets)
    assert values["r2"] == pytest.approx(1)
    for name in ("best", "worst", "seeded-1"):
        image, seen, drawn, retrieved = ctx.images[name]
        np.testing.assert_allclose(drawn.astype(int), image, atol=1)
        assert 0 < (seen == image).mean() < 0.5
        assert (retrieved != image).mean() > 0.5


def test_the_guess_of_standardised_pixels_explains_nothing(outcome, tiny):
    _, values, found = outcome(tiny("mae"), lambda targets, masks: torch.zeros_like(targets))
    assert values["r2"] == pytest.approx(0)
    assert found["r2"].chance == 0


def test_latents_are_shown_as_retrieved_patches_in_place_of_the_hidden_ones(outcome, tiny):
    ctx, _, found = outcome(tiny("latent-mim", "masking.gap=2"), pictures=4)
    assert "r2" not in found
    assert list(ctx.images) == ["best", "median", "worst", "seeded-1"]
    image, seen, filled = (panel[::6, ::6].astype(int) for panel in ctx.images["best"])
    assert image.shape == (24, 24, 3)
    grey = (seen == 127).all(axis=-1)
    assert (seen[~grey] == image[~grey]).all()
    assert (filled[~grey] == image[~grey]).all()
    assert (filled == 127).all(axis=-1).sum() == 24 * 24 - 16 * 16


def test_pictures_may_be_fewer_or_none(outcome, tiny):
    assert list(outcome(tiny("mae"), pictures=1)[0].images) == ["best"]
    assert not outcome(tiny("mae"), pictures=0)[0].images


@pytest.mark.parametrize("name", ["mae", "latent-mim", "i-jepa"])
def test_the_same_seed_gives_the_same_and_more_images_change_none_of_the_first(outcome, tiny, name):
    recipe = tiny(name, "masking.gap=1")
    first, _, found = outcome(recipe, images=20, pictures=23)
    again, _, same = outcome(recipe, images=20, pictures=23)
    assert first.images.keys() == again.images.keys()
    for picture, panels in first.images.items():
        np.testing.assert_array_equal(panels, again.images[picture])
    for metric in found:
        np.testing.assert_array_equal(found[metric].items, same[metric].items)
    more, _, _ = outcome(recipe, images=40, pictures=23)
    for number in range(1, 21):
        for panel in (0, 1):
            picture = f"seeded-{number}"
            np.testing.assert_array_equal(first.images[picture][panel], more.images[picture][panel])


def test_another_seed_hides_other_patches_of_other_images(outcome, tiny):
    (image, seen, *_), (other, hidden, *_) = (
        outcome(tiny("mae"), seed=seed)[0].images["seeded-1"] for seed in (0, 1)
    )
    assert (image != other).any()
    assert ((seen == 127).all(axis=-1) != (hidden == 127).all(axis=-1)).any()


def test_recipes_of_one_masking_hide_the_same_patches_of_the_same_images(outcome, tiny):
    seen = [outcome(tiny(name))[0].images["seeded-2"][:2] for name in ("mae", "latent-mim-naive")]
    np.testing.assert_array_equal(*seen)


def test_both_are_drawn_by_distance(outcome, tiny):
    ctx, _, _ = outcome(tiny("mae", "masking.visible=3"), lambda targets, masks: targets)
    data = ctx.saved["distance"]
    assert list(data["x"]) == [1, 2]
    assert data["series"].keys() == {"content", "retrieval"}
    assert data["series"]["retrieval"] == pytest.approx([1, 1])


def test_distances_are_those_of_a_king():
    asked, seen = np.array([0, 7, 24, 12]), np.array([3, 20])
    expected = [
        min(max(abs(a // 5 - v // 5), abs(a % 5 - v % 5)) for v in seen.tolist()) for a in asked.tolist()
    ]
    assert _distances(SimpleNamespace(asked=asked, visible=seen), 5).tolist() == expected == [3, 1, 4, 2]


def test_the_chance_of_the_own_place_is_its_share_of_the_patches_of_other_images(outcome, tiny):
    hidden = []

    def answer(targets, masks):
        hidden.extend(masks.hidden.flatten(1).tolist())
        return targets

    _, _, found = outcome(tiny("latent-mim-naive", "masking.visible=0.6"), answer, images=5)
    shares = []
    for i, own in enumerate(hidden):
        others = [place for k, places in enumerate(hidden) if k != i for place in places]
        shares.append(np.mean([others.count(place) / len(others) for place in own]))
    assert found["same_place"].chance == pytest.approx(np.mean(shares))


def test_the_best_image_is_one_that_is_right_and_the_worst_is_not(outcome, tiny):
    def draw(i):
        return (noise(i) // 3 + (170 if i % 2 else 0)).astype(np.uint8)

    def right_if_bright(targets, masks):
        return targets * (targets.mean(dim=(1, 2), keepdim=True) > 0)

    ctx, _, _ = outcome(tiny("mae", "target.norm_pixels=false"), right_if_bright, draw=draw)
    assert ctx.images["best"][0].mean() > 170
    assert ctx.images["worst"][0].mean() < 90


def test_an_image_without_any_contrast_is_neither_best_nor_worst(outcome, tiny):
    def draw(i):
        return np.full((16, 16, 3), 120, dtype=np.uint8) if i % 2 else noise(i)

    ctx, _, _ = outcome(tiny("mae", "target.norm_pixels=false"), draw=draw)
    for name in ("best", "median", "worst"):
        assert ctx.images[name][0].std() > 10


def test_one_image_is_too_few(monkeypatch, context, tiny, built):
    trained = Trained(tiny("mae"), built(tiny("mae")), 0)
    monkeypatch.setattr("lmim_bench.pretrain.trained.load_trained", lambda reference: trained)
    with pytest.raises(TaskError, match="holds 1 of the 2 images"):
        context(count=1).run(TASK)


def test_predictions_that_are_not_finite_fail(outcome, tiny):
    with pytest.raises(TaskError, match="the training diverged"):
        outcome(tiny("mae"), lambda targets, masks: targets * torch.nan)


# ------------------------------------------------------------------------------------------- whole runs

SMALL = (
    "model.embed_dim=24",
    "model.depth=2",
    "model.num_heads=2",
    "model.patch_size=8",
    "data.image_size=32",
    "decoder.width=16",
    "decoder.depth=1",
    "decoder.num_heads=2",
    "projector.hidden_dim=32",
    "optim.batch_size=16",
    "optim.steps=6",
    "watch.checkpoints=2",
    "watch.evaluations=0",
    "watch.keep_encoders=true",
    "watch.tensorboard=false",
    "engine.device=cpu",
)


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    """Some embedded scenes, and trainings on them: mae, latent-mim (with a gap), i-jepa."""
    root = tmp_path_factory.mktemp("trainings")
    generate(root, Sizes(train_per_class=4, val_per_class=4, segmentation=(1, 1), sequences=1))
    for name, *sets in (
        ("mae",),
        ("latent-mim", "masking.gap=2"),
        ("i-jepa", "masking.min_context=1"),
    ):
        pretrain(name, str(root / "scenes"), root / name, sets=(*SMALL, *sets), cache_dir=root / "cache")
    return root


@pytest.fixture
def copy(trainings, tmp_path):
    """A copy of the training of Latent MIM, to be broken."""
    return shutil.copytree(trainings / "latent-mim", tmp_path / "copy")


def score(trainings, out, checkpoints, *tasks, **options):
    """Run on the scenes; the run file and what was said on the way."""
    said = io.StringIO()
    found = run(
        {label: str(reference) for label, reference in checkpoints.items()},
        tasks=list(tasks),
        data=[str(trainings / "scenes")],
        limit=40,
        out=out,
        cache_dir=trainings / "cache",
        device="cpu",
        reporter=Reporter(Console(file=said)),
        debug=True,
        **options,
    )
    return found, said.getvalue()


def test_trained_encoders_are_diagnosed_and_shown_in_the_report(trainings, tmp_path):
    checkpoints = {name: trainings / name / "encoder.pth" for name in ("mae", "latent-mim", "i-jepa")}
    found, said = score(trainings, tmp_path / "run", checkpoints, NAME)
    assert [r.status for r in found.results] == ["ok"] * 3
    assert not any(r.scored for r in found.results)
    metrics = {r.checkpoint.label: {s.metric for s in r.scores} for r in found.results}
    assert metrics["latent-mim"] == metrics["i-jepa"] == {"content", "retrieval", "same_place"}
    assert metrics["mae"] == {"r2", *metrics["i-jepa"]}
    for one in (s for r in found.results for s in r.scores):
        assert one.low - 1e-9 <= one.value <= one.high + 1e-9
        assert one.n == 40
    for result in found.results:
        drawn = [n for n in result.notes if "16 images see as many patches as the poorest of them" in n]
        assert len(drawn) == (result.checkpoint.label == "i-jepa")
        strips = [a for a in result.artefacts if a.kind == "image"]
        assert len(strips) == 6
        assert {len(a.files) for a in strips} == {4 if result.checkpoint.label == "mae" else 3}
    assert "left out" not in said
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Hidden patches, best of 40 images" in page
    assert "what is seen of it (1 of 16 patches)" in page


def test_checkpoints_without_a_decoder_are_left_out_with_the_reason(trainings, tmp_path):
    away = shutil.copy(trainings / "mae" / "encoder.pth", tmp_path / "away.pth")
    mine = trainings / "mae" / "encoder.pth"
    checkpoints = {"mine": mine, "away": away, "control": f"random:{mine}", "pixels": "pixels"}
    found, said = score(trainings, tmp_path / "run", checkpoints, NAME, "diagnose")
    assert {(r.checkpoint.label, r.task) for r in found.results} == {
        ("mine", NAME),
        *((label, "diagnose") for label in checkpoints),
    }
    assert {r.status for r in found.results} == {"ok"}
    (first, second) = [line for line in said.splitlines() if "is left out" in line]
    assert first.startswith(f"{NAME} is left out for away: there is no decoder beside it")
    assert second.startswith(f"{NAME} is left out for control, pixels: there is no decoder")
    planned = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))["cells"]
    assert len(planned) == len(found.results)


def test_a_task_asked_for_by_name_that_nothing_is_left_of_is_an_error(trainings, tmp_path):
    for tasks in ((NAME,), (NAME, "diagnose")):
        with pytest.raises(ConfigError, match=f"^{NAME} can run on no checkpoint of this run: there is no"):
            score(trainings, tmp_path / "run", {"pixels": "pixels"}, *tasks)
    assert not (tmp_path / "run").exists()


def test_all_tasks_of_a_checkpoint_without_a_decoder_are_the_other_ones(trainings, tmp_path):
    said = io.StringIO()
    config = make_config(
        "pixels",
        tasks=["all"],
        data=[str(trainings / name) for name in ("scenes", "scenes-seg", "scenes-video")],
        out=tmp_path / "run",
        device="cpu",
        cache_dir=trainings / "cache",
    )
    opened = open_run(make_plan(config), Reporter(Console(file=said)), "")
    tasks = {cell.evaluation.task.name for cell in opened.cells}
    assert NAME not in tasks
    assert {"knn", "vos", "diagnose"} <= tasks
    assert said.getvalue().count("is left out") == 1


def test_a_suite_of_nothing_else_is_an_error_too(tmp_path):
    suite = tmp_path / "suite.yaml"
    suite.write_text(f"data:\n  scenes: {{path: scenes}}\ntasks:\n  {NAME}: {{data: scenes}}\n")
    config = RunConfig(checkpoints=(CheckpointConfig(reference="pixels", label="a"),), suite=str(suite))
    with pytest.raises(ConfigError, match="can run on no checkpoint"):
        open_run(make_plan(config), Reporter(Console(file=io.StringIO())), "")


# ------------------------------------------------------------------------------------------- whose decoder


@pytest.mark.parametrize("name", ["latent-mim", "i-jepa"])  # the online encoder, and the target
def test_the_model_of_an_encoder_is_that_of_its_step(trainings, name):
    folder = trainings / name
    for file, step in (("encoder.pth", 6), ("encoders/step-00000003.pth", 3)):
        trained = load_trained(str(folder / file))
        assert trained.step == step
        assert trained.recipe.name == name
        kept = torch.load(folder / "states" / f"step-{step:08d}.pth", weights_only=True)["model"]
        assert kept.keys() == trained.model.state_dict().keys()
        for key, tensor in trained.model.state_dict().items():
            assert torch.equal(tensor, kept[key])


def test_options_of_a_reference_and_links_lead_to_the_same_decoder(trainings, tmp_path):
    file = trainings / "mae" / "encoder.pth"
    (tmp_path / "link.pth").symlink_to(file)
    for reference in (f"{file}#pooling=cls,image_size=64", str(tmp_path / "link.pth")):
        assert load_trained(reference).step == 6


def refused(reference):
    """The reason, which is one line, and the same that a run gives."""
    with pytest.raises(CheckpointError) as caught:
        load_trained(str(reference))
    reason = str(caught.value)
    assert "\n" not in reason
    return reason


def test_a_training_without_states_has_no_decoder(copy):
    shutil.rmtree(copy / "states")
    assert "states holds no step-*.pth" in refused(copy / "encoder.pth")
    assert "states holds no step-*.pth" in TASK.applies(str(copy / "encoder.pth"))


def test_a_decoder_of_another_encoder_is_not_taken(copy, trainings):
    shutil.copy(trainings / "i-jepa" / "encoder.pth", copy / "encoder.pth")
    assert refused(copy / "encoder.pth").endswith("are of other encoders than this one")
    content = torch.load(trainings / "latent-mim" / "encoder.pth", weights_only=True)
    content["encoder"]["blocks.1.mlp.fc2.bias"][3] += 1e-6
    torch.save(content, copy / "encoder.pth")
    assert refused(copy / "encoder.pth").endswith("are of other encoders than this one")


def test_a_truncated_state_is_named_and_an_older_encoder_still_finds_its_own(copy):
    newest = copy / "states" / "step-00000006.pth"
    newest.write_bytes(newest.read_bytes()[:-2000])
    reason = refused(copy / "encoder.pth")
    assert "no state that can be read holds this encoder" in reason
    assert "step-00000006.pth cannot be read" in reason
    assert load_trained(str(copy / "encoders" / "step-00000003.pth")).step == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(model=[1, 2]),
        lambda state: state["model"].pop("encoder.vit.blocks.1.mlp.fc2.bias"),
        lambda state: state["model"].update({"encoder.vit.blocks.2.mlp.fc2.bias": torch.zeros(24)}),
        lambda state: state.update(model={}),
    ],
)
def test_a_state_with_other_tensors_is_no_decoder(copy, change):
    for path in (copy / "states").iterdir():
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)
    assert refused(copy / "encoder.pth").endswith("are of other encoders than this one")


def test_a_recipe_that_the_state_does_not_fit_is_said(copy):
    content = json.loads((copy / "recipe.json").read_text())
    content["recipe"]["decoder"]["depth"] = 2
    (copy / "recipe.json").write_text(json.dumps(content))
    assert "does not fit the recipe beside it" in refused(copy / "encoder.pth")


def test_a_recipe_that_is_none_leaves_the_task_out(copy):
    (copy / "recipe.json").write_text("{}")
    assert "recipe.json is not a training" in TASK.applies(str(copy / "encoder.pth"))


def test_looking_for_a_decoder_leaves_the_global_random_state_alone(trainings):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load_trained(str(trainings / "mae" / "encoder.pth"))
    assert torch.equal(torch.rand(1), expected)
