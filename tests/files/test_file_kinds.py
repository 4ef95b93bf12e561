"""Every kind of file: what is damaged, doctored or no file at all is one line, never a number."""

from __future__ import annotations

import json
import os
import random
import re
import struct
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

import gainlens as gl
from gainlens.analysis.sweep.points import Point
from gainlens.errors import FileFormatError, GainlensError
from gainlens.export import SlicePlan
from gainlens.files import load_tensors, read_json, save_tensors, sealed
from gainlens.model.config_limits import check_config
from gainlens.probes.gains import ModelCard
from gainlens.stats.stopping import StoppingRule
from gainlens.training import checkpoint
from gainlens.training.slices import Slice

pytestmark = pytest.mark.one_env
CARD = ModelCard("ab" * 32, "Llama", 2, 4, 2, 4, "half", 4)


def gains():
    sums = {
        f"k_sum.{s}": torch.ones(2, 2, 4, dtype=torch.float64) for s in ("projected", "rotated")
    }
    sums |= {name.replace("sum", "sq"): 2 * value for name, value in sums.items()}
    return gl.KeyGains(CARD, sums, 10, 2, ("text",), torch.ones(2, 2), ("doc",))


def mask():
    keep = torch.ones(2, 2, 4, dtype=torch.bool)
    keep[..., [1, 3]] = False
    return gl.KeyMask(keep, {"score": "qk"})


def refit():
    maps = mask().keep.double().diag_embed().float()
    return gl.ablation.RefitCut(mask(), maps.repeat_interleave(2, 1), maps, {"rounds": 2})


def slots():
    of = refit()
    own = torch.tensor([[1.0, 0.1], [1.0, 0.1]], dtype=torch.float64)
    moved = own[:, None].expand(-1, 2, -1) * 0.5
    return gl.ablation.SlotCut(mask(), of.query_maps, of.key_maps, moved, own, facts={"text": "t"})


def curve(stopping=False):
    rule = StoppingRule(0.1, (2, 4)) if stopping else None
    losses = np.array([[3.0, 3.1, 3.2, 3.3]])
    if stopping:
        losses[0, 2:] = np.nan
    point = Point("qk", "head", "pair", "zero", "quietest", 0.5)
    return gl.SurgeryCurve([point], losses, np.full(4, 3.0), CARD, "text", 100, rule)


def cmap():
    x = np.random.default_rng(0).gamma(2.0, size=(3, 2, 8))
    return gl.coordinate_map(x, n_permutations=20, frequency=tuple(0.5**i for i in range(8)))


class Run:
    """A checkpoint of training, as a thing that is saved and loaded."""

    header: ClassVar = {"model": "m"}

    def __init__(self):
        leaf = torch.nn.Parameter(torch.ones(3, 2))
        self.slices = [Slice("q", "qk", torch.nn.Parameter(torch.ones(3, 2)), [], leaf=leaf)]
        self.optimizer = torch.optim.Adam([self.slices[0].leaf])
        self.slices[0].leaf.grad = torch.ones(3, 2)
        self.optimizer.step()

    def save(self, path):
        row = {"step": 3, "tokens": 9, "loss": 1.0}
        progress = {"step": 3, "curve": [row], "tokens": 9, "seconds": 1.0}
        progress |= {"stopped": "steps", "bytes": {}}
        checkpoint.save_checkpoint(Path(path), self.slices, self.optimizer, self.header, progress)

    @classmethod
    def load(cls, path):
        run, state = cls(), torch.get_rng_state()
        before = run.slices[0].leaf.detach().clone()
        try:
            checkpoint.load_checkpoint(Path(path), run.slices, run.optimizer, cls.header)
        except GainlensError:  # then nothing of the run has changed
            assert torch.equal(run.slices[0].leaf, before)
            assert torch.equal(torch.get_rng_state(), state)
            raise
        return run


KINDS = {
    "gains": gains,
    "mask": mask,
    "refit": refit,
    "slots": slots,
    "surgery": curve,
    "map": cmap,
    "slice_plan": lambda: SlicePlan(mask().keep, (4, 2), fingerprint="ab", facts={"score": "qk"}),
    "training": Run,
}
"""Kind of file: how to make what is saved in one. A new kind is tested by a row here."""
JSON = ("surgery", "slice_plan")
ELSEWHERE = {"surgery-sweep", "training-facts", "behaviours"}
"""Tested in tests/analysis/sweep and tests/training; behaviours are never read."""


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("kinds") / "file"
    thing = KINDS[request.param]()
    thing.save(path)
    return request.param, type(thing), path, path.read_bytes()


def same(name, one, other):
    """Whether two files hold the same (safetensors orders its header as it likes)."""
    if name in JSON:
        return one.read_bytes() == other.read_bytes()
    (a, facts_a), (b, facts_b) = (load_tensors(path, name) for path in (one, other))
    equal = a.keys() == b.keys() and all(
        torch.equal(a[k].nan_to_num(), b[k].nan_to_num()) for k in a
    )
    return equal and facts_a == facts_b


def test_every_kind_in_the_code_has_a_row():
    root = Path(gl.__file__).parent
    code = "\n".join(p.read_text(encoding="utf-8") for p in root.rglob("*.py"))
    named = set(re.findall(r'(?:save_tensors|load_tensors)\(\s*\w+, "([\w-]+)"', code))
    named |= set(re.findall(r'^KIND = "([\w-]+)"', code, re.MULTILINE))
    named |= set(re.findall(r'^    kind = "([\w-]+)"', code, re.MULTILINE))  # of cuts
    assert named - ELSEWHERE - {"gainlens-report", "gainlens-comparison"} == set(KINDS)


def test_what_was_saved_is_read_and_written_alike(kind, tmp_path):
    name, cls, path, _ = kind
    cls.load(path).save(tmp_path / "again")
    assert same(name, path, tmp_path / "again")


def test_truncated_anywhere(kind, tmp_path):
    _, cls, _, content = kind
    draw = random.Random(0)
    for size in {0, 1, 7, 8, 9, len(content) // 2, len(content) - 2} | {
        draw.randrange(len(content) - 1) for _ in range(10)
    }:
        (tmp_path / "cut").write_bytes(content[:size])
        with pytest.raises(FileFormatError) as caught:
            cls.load(tmp_path / "cut")
        assert "\n" not in str(caught.value)


def test_one_flipped_bit_is_an_error_or_changes_nothing(kind, tmp_path):
    name, cls, path, content = kind
    draw, refused = random.Random(1), 0
    for _ in range(60):
        data = bytearray(content)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (tmp_path / "bit").write_bytes(data)
        try:
            again = cls.load(tmp_path / "bit")
        except FileFormatError:
            refused += 1
        else:  # white space between two words of JSON, say
            again.save(tmp_path / "again")
            assert same(name, path, tmp_path / "again")
    assert refused > (20 if name in JSON else 40)


def test_what_is_no_regular_file(kind, tmp_path):
    _, cls, _, _ = kind
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), tmp_path / "x", tmp_path / "loop"):
        with pytest.raises(FileFormatError, match="can't be read"):
            cls.load(path)


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 10**5 + "1" + "}" * 10**5, "[[]" * 10**5])
def test_deep_json_is_one_line(text, tmp_path):
    (tmp_path / "deep").write_text(text)
    for load in (read_json, SlicePlan.load, gl.SurgeryCurve.load):
        with pytest.raises(FileFormatError, match="nested more than|JSON") as caught:
            load(tmp_path / "deep")
        assert len(str(caught.value)) < 300
    save_deep = (tmp_path / "t", "mask", {"keep": mask().keep}, {})
    save_tensors(*save_deep)
    raw = (tmp_path / "t").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    header["__metadata__"]["facts"] = text
    new = json.dumps(header).encode()
    (tmp_path / "t").write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + size :])
    with pytest.raises(FileFormatError):
        gl.KeyMask.load(tmp_path / "t")


def test_large_json_is_not_read(tmp_path):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)  # a terabyte of nothing
    with pytest.raises(FileFormatError, match="expected at most"):
        read_json(tmp_path / "large")


def test_nan_in_json_is_refused(tmp_path):
    for word in ("NaN", "Infinity", "-Infinity"):
        (tmp_path / "x").write_text(f"[{word}]")
        with pytest.raises(FileFormatError, match=word):
            read_json(tmp_path / "x")
    with pytest.raises(gl.errors.InputError, match="no NaN"):
        gl.KeyMask(mask().keep, {"x": float("nan")}).save(tmp_path / "mask")
    assert not (tmp_path / "mask").exists()


def nan(tensor, value=float("nan")):
    changed = tensor.clone()
    changed.view(-1)[0] = value
    return changed


TENSORS = {
    "gains: NaN": ("gains", lambda t, f: t.update({"k_sq.rotated": nan(t["k_sq.rotated"])})),
    "gains: negative": ("gains", lambda t, f: t.update({"k_sq.rotated": -t["k_sq.rotated"]})),
    "gains: mean": ("gains", lambda t, f: t.update({"k_sum.rotated": 9 * t["k_sum.rotated"]})),
    "gains: type": ("gains", lambda t, f: t.update({"k_sq.rotated": t["k_sq.rotated"].float()})),
    "gains: pairing": ("gains", lambda t, f: f["model"].update(pairing="zzz")),
    "gains: tokens": ("gains", lambda t, f: f.update(n_tokens=-5)),
    "gains: no tokens": ("gains", lambda t, f: f.update(n_tokens=0)),
    "gains: true": ("gains", lambda t, f: f.update(n_tokens=True)),
    "gains: rotary": ("gains", lambda t, f: f["model"].update(rotary_dim=6)),
    "gains: odd": ("gains", lambda t, f: f["model"].update(rotary_dim=3)),
    "gains: heads": ("gains", lambda t, f: f["model"].update(n_heads=3)),
    "gains: layers": ("gains", lambda t, f: f["model"].update(n_layers=10**6)),
    "gains: unknown": ("gains", lambda t, f: f.update(more=1)),
    "gains: stage": ("gains", lambda t, f: t.update({"k_sq.x": t["k_sq.rotated"].clone()})),
    "mask: type": ("mask", lambda t, f: t.update(keep=t["keep"].float())),
    "mask: axes": ("mask", lambda t, f: t.update(keep=t["keep"][0])),
    "mask: empty": ("mask", lambda t, f: t.update(keep=t["keep"][:0])),
    "mask: more": ("mask", lambda t, f: t.update(more=t["keep"].clone())),
    "refit: cut rows": ("refit", lambda t, f: t.update(key_maps=torch.ones(2, 2, 4, 4))),
    "refit: query rows": ("refit", lambda t, f: t.update(query_maps=torch.ones(2, 4, 4, 4))),
    "refit: NaN": ("refit", lambda t, f: t.update(key_maps=nan(t["key_maps"]))),
    "refit: heads": ("refit", lambda t, f: t.update(query_maps=t["query_maps"][:, :3])),
    "refit: facts": ("refit", lambda t, f: f.update(refit=[])),
    "training: NaN": ("training", lambda t, f: t.update({"active.q": nan(t["active.q"])})),
    "training: state": (
        "training",
        lambda t, f: t.update({"optimizer.0.exp_avg": nan(t["optimizer.0.exp_avg"], torch.inf)}),
    ),
    "training: shape": ("training", lambda t, f: t.update({"active.q": torch.ones(2)})),
    "training: lacks": ("training", lambda t, f: t.pop("active.q")),
    "training: leaf": (
        "training",
        lambda t, f: t.update({"optimizer.7.exp_avg": torch.ones(3, 2)}),
    ),
    "training: step": ("training", lambda t, f: f["progress"].update(step=5)),
    "training: negative": ("training", lambda t, f: f["progress"].update(tokens=-1)),
    "training: random": ("training", lambda t, f: t.update(random=torch.ones(3))),
    "map: p": ("map", lambda t, f: t.update({"map.universal.presence": t["map.cv"] + 5})),
    "map: NaN": ("map", lambda t, f: t.update({"map.cosine": nan(t["map.cosine"])})),
    "map: range": ("map", lambda t, f: t.update({"map.cosine": 7 * t["map.cosine"]})),
    "map: shape": ("map", lambda t, f: t.update({"map.cosine": t["map.cosine"][:2]})),
    "map: type": ("map", lambda t, f: f["map"]["fields"].update(n_documents="many")),
    "map: lacks": ("map", lambda t, f: f["map"]["fields"].pop("cv")),
    "map: part": ("map", lambda t, f: f["map"]["fields"].update(universal=None)),
}


@pytest.mark.parametrize("change", TENSORS)
def test_doctored_tensors_with_a_right_checksum(change, tmp_path):
    name, doctor = TENSORS[change]
    thing = KINDS[name]()
    thing.save(tmp_path / "file")
    tensors, facts = load_tensors(tmp_path / "file", name)
    doctor(tensors, facts)
    save_tensors(tmp_path / "file", name, tensors, facts)
    with pytest.raises(FileFormatError, match="file holds no") as caught:
        type(thing).load(tmp_path / "file")
    assert "\n" not in str(caught.value)


def losses(value, at=0):
    return lambda d: d["points"][0]["losses"].__setitem__(at, value)


PLAIN = {
    "surgery: null": ("surgery", losses(None)),
    "surgery: null at the end": ("surgery", losses(None, 3)),
    "surgery: infinite": ("surgery", losses(1e999)),
    "surgery: text": ("surgery", losses("3.0")),
    "surgery: baseline": ("surgery", lambda d: d.update(baseline=[3.0, 3.0, None, 3.0])),
    "surgery: fewer": ("surgery", lambda d: d["points"][0]["losses"].pop()),
    "surgery: order": ("surgery", lambda d: d["points"][0].update(order="zzz")),
    "surgery: fraction": ("surgery", lambda d: d["points"][0].update(fraction=1.5)),
    "surgery: tokens": ("surgery", lambda d: d.update(n_tokens=-1)),
    "surgery: pairing": ("surgery", lambda d: d["model"].update(pairing="zzz")),
    "plan: shape": ("slice_plan", lambda d: d.update(shape=[10**6, 10**6, 10**6])),
    "plan: layers": ("slice_plan", lambda d: d.update(shape=[60000, 1, 4], keep=[[[0]]] * 60000)),
    "plan: outside": ("slice_plan", lambda d: d["keep"][0][0].append(9)),
    "plan: twice": ("slice_plan", lambda d: d["keep"][0].__setitem__(0, [0, 0])),
    "plan: true": ("slice_plan", lambda d: d["keep"][0].__setitem__(0, [True])),
    "plan: empty": ("slice_plan", lambda d: d["keep"][0].__setitem__(0, [])),
    "plan: basis": ("slice_plan", lambda d: d.update(basis="zzz")),
    "plan: widths": ("slice_plan", lambda d: d.update(value_widths=[4, -2])),
    "plan: facts": ("slice_plan", lambda d: d.update(facts=None)),
}


@pytest.mark.parametrize("change", PLAIN)
def test_doctored_json_with_a_right_checksum(change, tmp_path):
    name, doctor = PLAIN[change]
    thing = KINDS[name]()
    thing.save(tmp_path / "file")
    value = json.loads((tmp_path / "file").read_text())
    del value["checksum"]
    doctor(value)
    text = json.dumps(value)
    if "Infinity" not in text:
        text = json.dumps(sealed(name, value))
    (tmp_path / "file").write_text(text)
    with pytest.raises(FileFormatError) as caught:
        type(thing).load(tmp_path / "file")
    assert "checksum" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_point_that_stopped_early_lacks_its_tail_alone(tmp_path):
    curve(stopping=True).save(tmp_path / "file")
    assert gl.SurgeryCurve.load(tmp_path / "file").deltas(0).tolist() == pytest.approx([0.0, 0.1])
    for bad in ([None, 3.1, None, None], [3.0, None, None, None], [3.0, 3.1, 3.2, None]):
        value = json.loads((tmp_path / "file").read_text())
        del value["checksum"]
        value["points"][0]["losses"] = bad
        (tmp_path / "bad").write_text(json.dumps(sealed("surgery", value)))
        with pytest.raises(FileFormatError, match="a document has none"):
            gl.SurgeryCurve.load(tmp_path / "bad")


def test_an_infinite_loss_is_never_left_out_of_a_curve():
    """In memory as in files: the verdict would be of the other documents alone."""
    good = curve()
    for value in (np.inf, np.nan):
        bad = good.losses.copy()
        bad[0, 1] = value
        with pytest.raises(gl.errors.InputError, match="infinite one"):
            gl.SurgeryCurve(good.points, bad, good.baseline, CARD, "text", 100)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 10**6},
        {"n_layer": 10**9},
        {"text_config": {"num_hidden_layers": 10**6}},
        {"num_hidden_layers": -1},
        {"hidden_size": 10**9},
    ],
)
def test_configs_of_no_model_end_before_one_is_built(settings, tmp_path):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (check_config, gl.load_model, gl.load_slim):
        with pytest.raises(FileFormatError, match="does not describe a valid model"):
            load(tmp_path)
