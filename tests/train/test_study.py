"""Studies: what a file may say, which runs it makes, and the report, compared with numbers computed by hand."""

import pytest
import yaml

from localvit.models.factory import create_model
from localvit.train.compare import read_runs
from localvit.train.recipe import read_recipe
from localvit.train.study import Study, chosen, read_study, study_names, study_runs
from localvit.train.study_report import arm_results, to_markdown, verdict
from run_folders import write_run

TEXT = """
question: Does it help?
settings: {model: localvit_nano_patch4_32, data_set: DIGITS, warmup_epochs: 1, model_args: {depth: 2}}
arms:
  local: {}
  plain: {model_args: {local_blocks: []}, lr: 0.002}
baseline: plain
epochs: [3, 2]
seeds: [0, 5, 7]
findings:
  - {better: local, than: plain, source: a paper}
"""


@pytest.fixture
def study(tmp_path) -> Study:
    (tmp_path / "own.yaml").write_text(TEXT)
    return read_study(str(tmp_path / "own.yaml"))


def test_every_arm_seed_and_length_is_a_run_of_its_own(study, tmp_path):
    runs = study_runs(study, tmp_path / "out", {"lr": 0.001, "device": "cpu"})
    assert [run.name for run in runs[:4]] == ["local-e2-s0", "plain-e2-s0", "local-e2-s5", "plain-e2-s5"]
    assert len({run.config.output_dir for run in runs}) == len(runs) == 2 * 2 * 3
    first, second = (run.config.to_dict() for run in runs[:2])
    assert (first["model_args"], second["model_args"]) == ({"depth": 2}, {"depth": 2, "local_blocks": []})
    assert {name for name in first if first[name] != second[name]} == {"model_args", "lr", "output_dir"}
    assert (first["lr"], second["lr"]) == (0.001, 0.002)  # an arm's own setting is what is studied
    assert (runs[-1].epochs, runs[-1].seed, runs[-1].config.epochs, runs[-1].config.seed) == (3, 7, 3, 7)


@pytest.mark.parametrize("name", study_names())
def test_the_packaged_studies_make_models_and_their_arms_differ(name):
    study = read_study(name)
    assert study.settings["cache"]
    assert len(study.seeds) >= 3
    models = []
    for arm, settings in study.arms.items():
        assert settings.keys() <= {"model_args"}, arm
        model = create_model(read_recipe(study.recipe)["model"], device="meta", **settings.get("model_args", {}))
        models.append([(key, tuple(value.shape)) for key, value in model.state_dict().items()])
        models[-1].append(str(model))
    assert len({str(each) for each in models}) == len(models)
    assert study.arms[study.baseline] == {"model_args": {"local_blocks": []}}
    assert study.findings


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("baseline: plain", "baseline: none", "'none' is not one of the arms local, plain"),
        ("than: plain", "than: other", "'other' is not one of the arms"),
        ("lr: 0.002", "seed: 2", "plain sets seed, which the study gives to each run"),
        ("epochs: [3, 2]", "epochs: [0]", "epochs.0: Input should be greater than or equal to 1"),
        ("epochs: [3, 2]", "epoch: [3]", "epoch: Extra inputs are not permitted"),
        ("  local: {}\n", "", "at least 2 items"),
        ("  local: {}", "  ../x: {}", "should match pattern"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path, old, new, message):
    path = tmp_path / "own.yaml"
    assert old in TEXT
    path.write_text(TEXT.replace(old, new))
    with pytest.raises(ValueError, match=r"own\.yaml: ") as error:
        read_study(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_study_or_setting_or_arm_is_named(study, tmp_path):
    with pytest.raises(FileNotFoundError, match="no study 'nothing'; give a YAML file or one of activation, depthwise"):
        read_study("nothing")
    with pytest.raises(ValueError, match="arm local: lr_rate is not a training setting; did you mean drop_rate"):
        study_runs(study, tmp_path, {"lr_rate": 1})
    with pytest.raises(ValueError, match="no arm 'x'; the arms are local, plain"):
        chosen(study, (), (), ("x",))
    with pytest.raises(ValueError, match=r"^seeds.0: Input should be greater than or equal to 0$"):
        chosen(study, (), (-1,), ())
    with pytest.raises(ValueError, match="seed cannot be set for all runs: the study gives each run its own"):
        study_runs(study, tmp_path, {"seed": 3})
    smaller = chosen(study, (4,), (9, 9), ("local",))
    assert (smaller.epochs, smaller.seeds, [*smaller.arms]) == ((4,), (9,), ["local", "plain"])


def write(run, accuracies, images=50.0):
    """The folder of a run as training leaves it."""
    settings = {name: value for name, value in run.config.to_dict().items() if name != "output_dir"}
    write_run(run.config.output_dir, accuracies, metrics={"test_images": images}, **settings)


def test_a_finished_run_is_kept_and_one_with_other_settings_is_refused(study, tmp_path):
    first, second, *_ = study_runs(study, tmp_path / "out", {})
    assert first.read() is None
    assert not first.is_finished
    write(first, [10.0, 20.0])
    write(second, [10.0])
    assert first.is_finished
    assert not second.is_finished
    [changed, *_] = study_runs(study, tmp_path / "out", {"weight_decay": 0.5})
    with pytest.raises(FileExistsError, match=r"local-e2-s0 has a run with other settings \(weight_decay\)"):
        _ = changed.is_finished
    [elsewhere, *_] = study_runs(study, tmp_path / "out", {"device": "cpu", "workers": 0})
    assert elsewhere.is_finished


def test_the_report_has_means_spreads_and_paired_gains(study, tmp_path):
    runs = study_runs(study, tmp_path / "out", {})
    acc1 = {("local", 0): 50.0, ("local", 5): 54.0, ("plain", 0): 40.0, ("plain", 5): 46.0, ("plain", 7): 90.0}
    for run in runs:
        if run.epochs == 3 and (run.arm, run.seed) in acc1:
            write(run, [1.0, 2.0, acc1[run.arm, run.seed]])
    finished = [(run, read_runs([run.config.output_dir])[0]) for run in runs if run.is_finished]
    results = arm_results(study, finished)
    assert [(each.arm, each.acc1, each.gains) for each in results] == [
        ("local", {0: 50.0, 5: 54.0}, {0: 10.0, 5: 8.0}),  # the seed 7, which only one arm has, is in no gain
        ("plain", {0: 40.0, 5: 46.0, 7: 90.0}, {0: 0.0, 5: 0.0, 7: 0.0}),
    ]
    text = to_markdown(study, finished, 7)
    # sqrt(((50 - 52)^2 + (54 - 52)^2) / 1) = 2.83; sqrt((1 + 1) / 1) = 1.41; Wilson's interval of 26 of 50 images.
    assert "| local | 731,074 | 0, 5 | 52.00 ± 2.83 | 38.5 to 65.2 | +9.00 ± 1.41 |" in text
    assert "| plain | 731,074 | 0, 5, 7 | 58.67 ± 27.30 | 44.9 to 71.2 | - |" in text
    assert "- local better than plain (a paper): confirmed with each of 2 seeds after 3 epochs, +9.00 ± 1.41 p" in text
    assert "Runs of the study that are not finished: 7." in text


@pytest.mark.parametrize(
    ("local", "word"),
    [
        ({0: 41.0}, "the same direction, with one seed only, after 3 epochs, +1.00 points"),
        ({0: 39.0}, "not the same direction, with one seed only, after 3 epochs, -1.00 points"),
        ({0: 41.0, 5: 45.0}, "undecided: higher with 1 of 2 seeds after 3 epochs, +0.00 ± 1.41 points"),
        ({0: 39.0, 5: 45.0}, "not confirmed: not higher with any of 2 seeds after 3 epochs, -1.00 ± 0.00 points"),
        ({7: 50.0}, "not measured"),
    ],
)
def test_a_finding_is_said_plainly(study, tmp_path, local, word):
    acc1 = {"local": local, "plain": {0: 40.0, 5: 46.0}}
    runs = [run for run in study_runs(study, tmp_path / "out", {}) if run.seed in acc1[run.arm] and run.epochs == 3]
    for run in runs:
        write(run, [1.0, 2.0, acc1[run.arm][run.seed]])
    results = arm_results(study, [(run, read_runs([run.config.output_dir])[0]) for run in runs])
    assert verdict(study.findings[0], results) == f"local better than plain (a paper): {word}."


def test_the_file_of_a_study_is_the_description(study):
    assert Study(**yaml.safe_load(TEXT)) == study
