"""The distill stage: which layers the student gets, what loss it minimises, and what comes out."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from featherweight.checkpoint import opening
from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.distillation.losses import distillation_loss
from featherweight.distillation.spec import DistillSpec, StackLayers
from featherweight.errors import RecipeError, StageError
from featherweight.model import surgery
from featherweight.text.documents import Document, write_documents
from featherweight.training.threads import cores
from tasks.distill import distill

pytestmark = pytest.mark.slow

SPEC = DistillSpec(layers=2, steps=40, batch=4, sequence=32, learning_rate=3e-3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_documents(folder, [Document("json", Path(json.__file__).read_text())])
    return folder


@pytest.fixture(scope="module")
def teacher(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 5 layers whose answers are far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("teacher") / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    tokenizer = load_tokenizer(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, initializer_range=0.2, num_key_value_heads=2, **sizes)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def float64_loss(s, t, labels, temperature: float, weight: float):
    """Hinton et al. 2015, written out in float64, over the tokens that there is something to say of."""
    s, t, rows = s.double(), t.double(), labels >= 0
    p, q = (t / temperature).softmax(-1), (s / temperature).softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1)[rows].mean() * temperature**2
    ce = -s[rows].softmax(-1).gather(1, labels[rows][:, None]).log().mean()
    return weight * kl + (1 - weight) * ce


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (2.0, 0.5), (4.0, 0.9), (2.0, 0.0)])
@pytest.mark.parametrize("shape", [(24, 50), (600, 4000)])
def test_the_loss_and_its_gradient_are_the_formula(temperature: float, weight: float, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    s = (3 * torch.randn(shape, generator=generator)).requires_grad_()
    with torch.inference_mode():
        t = 3 * torch.randn(shape, generator=generator)
    labels = torch.randint(shape[1], shape[:1], generator=generator)
    labels[-1] = -100
    loss = distillation_loss(s, t, labels, temperature, weight)
    (gradient,) = torch.autograd.grad(3 * loss, s)
    expected = float64_loss(s, t.clone(), labels, temperature, weight)
    (expected_gradient,) = torch.autograd.grad(3 * expected, s)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-7)


def test_a_student_equal_to_its_teacher_has_no_kl() -> None:
    logits = torch.randn(10, 30)
    assert distillation_loss(logits, logits, torch.zeros(10, dtype=torch.long), 2.0, 1.0).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("wanted", "total", "expected"),
    [
        (2, 5, (0, 4)),
        (3, 5, (0, 2, 4)),
        (5, 5, (0, 1, 2, 3, 4)),
        (4, 6, (0, 2, 3, 5)),
        (1, 6, (0,)),
        ((1, 3), 5, (1, 3)),
    ],
)
def test_the_layers_of_the_student(wanted: int | tuple[int, ...], total: int, expected: tuple[int, ...]) -> None:
    assert surgery.chosen_layers(wanted, total) == expected


@pytest.mark.parametrize("wanted", [6, (0, 5), (2, 1), (1, 1), (), (-1, 2)])
def test_layers_that_the_teacher_lacks_are_refused(
    wanted: int | tuple[int, ...], teacher: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"distill\.layers"):
        distill(SPEC.model_copy(update={"layers": wanted}), checkpoint=teacher, text=text, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_stack_that_the_teacher_lacks_is_refused_by_name(teacher: Path, text: Path, tmp_path: Path) -> None:
    layers = StackLayers(encoder=1, decoder=2)
    with pytest.raises(RecipeError, match=r"distill\.layers\.encoder: the model has no encoder; leave it out"):
        distill(SPEC.model_copy(update={"layers": layers}), checkpoint=teacher, text=text, out=tmp_path)


def test_the_student_begins_as_the_chosen_layers(teacher: Path) -> None:
    model = opening.load_model(teacher)
    student = surgery.copy_layers(model, (0, 3))
    assert len(model.model.layers) == 5
    assert model.config.num_hidden_layers == 5
    for place, index in enumerate((0, 3)):
        for ours, theirs in zip(student.model.layers[place].parameters(), model.model.layers[index].parameters(), strict=True):
            assert torch.equal(ours, theirs)
            assert ours.data_ptr() != theirs.data_ptr()
    assert student.lm_head.weight is student.model.embed_tokens.weight
    ids = torch.randint(300, (1, 8))
    assert torch.equal(student.generate(ids, max_new_tokens=4, do_sample=False)[:, :8], ids)


def test_the_kinds_of_the_kept_layers_are_kept() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(
        vocab_size=64, num_hidden_layers=4, use_sliding_window=True, sliding_window=4, max_window_layers=2, **sizes
    )
    assert config.layer_types == 2 * ["full_attention"] + 2 * ["sliding_attention"]
    student = surgery.copy_layers(Qwen2ForCausalLM(config), (0, 3))
    assert student.config.layer_types == ["full_attention", "sliding_attention"]
    assert config.num_hidden_layers == len(config.layer_types) == 4


@pytest.mark.slow
def test_the_student_comes_closer_to_its_teacher(teacher: Path, text: Path, tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"kl_weight": 1.0})
    metrics = distill(spec, checkpoint=teacher, text=text, out=tmp_path)
    assert metrics["loss_last"] < 0.7 * metrics["loss_first"]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in teacher.iterdir()}
    student = opening.load_model(tmp_path)
    assert student.config.num_hidden_layers == len(student.model.layers) == 2
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert metrics["parameters"] == opening.parameters(student) < metrics["parameters_teacher"]
    assert metrics["teacher_loss"] > 0
    assert metrics["student_loss"] > 0


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(teacher: Path, text: Path, tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"steps": 4, "layers": (0, 2, 4)})
    digests = []
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        distill(spec, checkpoint=teacher, text=text, out=tmp_path / name, seed=seed)
        digests.append(hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]


def test_an_architecture_without_such_layers_is_refused(teacher: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(teacher, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(StageError, match=r"distill handles .*llama.*, not 'gpt2'"):
        distill(SPEC, checkpoint=folder, text=text, out=tmp_path)


@pytest.mark.skipif(cores() < 2, reason="needs two cores")
def test_two_processes_distill_as_one(teacher: Path, text: Path, tmp_path: Path) -> None:
    """Hidden states are matched as well, so that the projections are trained together too."""
    made = []
    for processes in (1, 2):
        spec = SPEC.model_copy(update={"steps": 4, "hidden_weight": 1.0, "processes": processes})
        out = tmp_path / str(processes)
        out.mkdir()
        metrics = distill(spec, checkpoint=teacher, text=text, out=out)
        made.append((metrics, opening.load_model(out)))
    (one, alone), (two, together) = made
    assert {name: two[name] for name in ("loss_first", "loss_last", "student_loss")} == pytest.approx(
        {name: one[name] for name in ("loss_first", "loss_last", "student_loss")}, abs=1e-4
    )
    for a, b in zip(alone.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)
