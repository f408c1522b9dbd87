"""Make the tiny hybrid: a small LFM2-MoE trained on text that SmolLM2 writes.

    python -m recipes.tiny_hybrid.make text  --smollm2 DIR --work DIR  # vLLM writes the text
    python -m recipes.tiny_hybrid.make train --work DIR                 # tokenizer, training
    python -m recipes.tiny_hybrid.make pack  --work DIR --out DIR       # tar in parts
    python -m recipes.tiny_hybrid.make all   --smollm2 DIR --work DIR --out DIR

Each step leaves its finished part in --work and does not redo it: `text` goes on after the last
shard written, `train` after its last saved state. `--tiny` does all of it in minutes on a CPU.
Every step appends a line to WORK/log.jsonl.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

MAX_TOKENS = 320  # SmolLM2's stories end by themselves before that about half the time
PART_BYTES = 12 << 20
SAMPLES = (
    "",
    "Once upon a time",
    "Explain the moon to a child.",
    "Write a short story about a shy fox who finds a key in the forest.",
)


def log(work: Path, step: str, **fields) -> None:
    line = json.dumps({"step": step, "time": time.strftime("%FT%TZ", time.gmtime()), **fields})
    with open(work / "log.jsonl", "a") as f:
        f.write(line + "\n")
    print(line, flush=True)


# ------------------------------------------------------------------------------------------ text


def text(args) -> None:
    """Several writers at once: with a model this small, a host core feeds an engine its steps
    slower than the card does them (one engine of 1024 sequences wrote 17,000 tokens/s on an H100).
    """
    if (args.work / "text" / "done").exists():
        return
    (args.work / "text").mkdir(exist_ok=True)
    commands = [
        [sys.executable, "-m", __spec__.name, "writer", f"--writer={i}", *flags_of(args)]
        for i in range(args.writers)
    ]
    running = [subprocess.Popen(command) for command in commands]
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit("a writer failed; what the others wrote is kept")
    (args.work / "text" / "done").touch()


def write_text(args) -> None:
    """SmolLM2 answers prompts in vLLM, in waves; a Parquet shard (prompt, answer, ended) a wave."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    from recipes.tiny_hybrid.prompts import prompts

    folder = args.work / "text"
    wave = 24 if args.tiny else 4096
    waves = 2 if args.tiny else args.max_waves
    started = time.monotonic()
    from vllm import LLM, SamplingParams

    if args.tiny:
        engine = {"enforce_eager": True, "kv_cache_memory_bytes": 256 << 20, "max_num_seqs": 24}
    else:
        # 23 KB a token: 12 GiB hold all 512 sequences at their longest
        engine = {"kv_cache_memory_bytes": 12 << 30, "gpu_memory_utilization": 0.1}
        engine["max_num_seqs"] = 512
    llm = LLM(str(args.smollm2), dtype="bfloat16", max_model_len=1024, seed=0, **engine)
    tokenizer = AutoTokenizer.from_pretrained(args.smollm2)
    log(args.work, "engine", seconds=round(time.monotonic() - started, 1))
    all_prompts = prompts(wave * waves, seed=1)
    spent, longest = 0.0, 0.0
    for number in range(args.writer, waves, args.writers):
        shard = folder / f"{number:03d}.parquet"
        if shard.exists():
            continue
        if spent + longest > args.text_seconds:
            break
        begun = time.monotonic()
        batch = all_prompts[number * wave : (number + 1) * wave]
        ids = tokenizer.apply_chat_template(
            [[{"role": "user", "content": p}] for p in batch],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        sampling = SamplingParams(
            temperature=0.8,
            min_p=0.06,
            max_tokens=48 if args.tiny else MAX_TOKENS,
            seed=None,
            detokenize=False,
        )
        outputs = llm.generate([{"prompt_token_ids": i} for i in ids], sampling, use_tqdm=False)
        done = [o.outputs[0] for o in outputs]
        texts = tokenizer.batch_decode([o.token_ids for o in done], skip_special_tokens=True)
        table = pa.table(
            {"prompt": batch, "answer": texts, "ended": [o.finish_reason == "stop" for o in done]}
        )
        fresh = shard.with_suffix(".tmp")
        pq.write_table(table, fresh, compression="zstd", compression_level=15)
        os.replace(fresh, shard)
        took = time.monotonic() - begun
        spent, longest = spent + took, max(longest, took)
        tokens = sum(len(o.token_ids) for o in done)
        ended = sum(o.finish_reason == "stop" for o in done) / len(done)
        log(args.work, "wave", number=number, tokens=tokens, ended=round(ended, 3),
            seconds=round(took, 1), tokens_per_s=round(tokens / took))  # fmt: skip


# ------------------------------------------------------------------------------------------ train


def train(args) -> None:
    from transformers import AutoTokenizer, Lfm2MoeForCausalLM

    from recipes.tiny_hybrid import model as hybrid
    from recipes.tiny_hybrid.documents import documents, pack_rows, read_answers
    from recipes.tiny_hybrid.state import load_state, save_state, save_weights
    from recipes.tiny_hybrid.tokenizer import train_tokenizer

    final = args.work / "bf16"
    if final.exists():
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    begun = time.monotonic()
    pairs = read_answers(args.work / "text")
    random.Random(0).shuffle(pairs)
    held = max(8, len(pairs) // 100)
    folder = args.work / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        train_tokenizer((f"{p}\n{a}" for p, a in pairs[held:]), args.vocab_size, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = 128 if args.tiny else 2048
    rows = pack_rows(documents(pairs[held:], tokenizer, seed=1), length)
    held_rows = pack_rows(documents(pairs[:held], tokenizer, seed=2), length)
    log(args.work, "documents", answers=len(pairs), rows=len(rows), tokens=int(rows.size),
        held_out_rows=len(held_rows), seconds=round(time.monotonic() - begun, 1))  # fmt: skip

    model = Lfm2MoeForCausalLM(hybrid.config(len(tokenizer), args.tiny)).to(device)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    data = torch.from_numpy(rows).to(device)
    held_data = torch.from_numpy(held_rows).to(device)
    batch = 4 if args.tiny else 16
    per_epoch = max(1, len(data) // batch)
    total = per_epoch * args.epochs
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    def loss_of(ids: torch.Tensor, dropout: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        with autocast:
            logits, loads = hybrid.forward(model, ids, dropout)
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten().long())
        return loss, loads

    def held_loss() -> float:
        with torch.no_grad():
            chunks = held_data.split(batch)
            return sum(loss_of(c)[0].item() * len(c) for c in chunks) / len(held_data)

    step, spent, best = 0, 0.0, math.inf
    saved = args.work / "train-state.safetensors"
    if saved.exists():
        step, spent, best = load_state(saved, model, optimizer)
        log(args.work, "resumed", at=step)
    mark, mark_step = time.monotonic(), step
    progress = 0.0
    while progress < 1:
        epoch, at = divmod(step, per_epoch)
        draw = np.random.default_rng(epoch)
        # each epoch cuts the rows elsewhere, so that none is seen twice
        cut = data.flatten().roll(int(draw.integers(length))).view_as(data)
        order = draw.permutation(len(data))[at * batch : (at + 1) * batch]
        ids = cut[torch.from_numpy(order).to(device)]
        # the schedule ends with the steps or with the seconds, whichever comes first
        progress = max((step + 1) / total, spent / args.train_seconds)
        rate = args.lr * min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, loads = loss_of(ids, args.dropout)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # balanced hard at first, then gently so that the routing settles
        hybrid.balance(model, loads, 5e-3 * (1 - min(progress, 1.0)))
        step += 1
        if step % 50 == 0 or progress >= 1:
            value = loss.item()
            now = time.monotonic()
            spent += now - mark
            speed = (step - mark_step) * batch * length / (now - mark)
            share = loads / loads.sum(-1, keepdim=True)
            note = {}
            if step % 100 == 0 or progress >= 1:
                note = {"held_out": round(held_loss(), 4)}
                if note["held_out"] < best:
                    # the text is small enough to be learnt by heart: what counts is held out
                    best = note["held_out"]
                    save_weights(args.work / "best.safetensors", model)
                if step % 500 == 0:
                    save_state(saved, model, optimizer, step, spent, best)
            log(args.work, "train", at=step, of=total, loss=round(value, 4), lr=round(rate, 6),
                tokens_per_s=round(speed), seconds=round(spent, 1),
                expert_share=[round(share.min().item(), 3), round(share.max().item(), 3)],
                **note)  # fmt: skip
            mark, mark_step = time.monotonic(), step
    model.load_state_dict(load_file(args.work / "best.safetensors"), strict=False)
    finish(args, model, tokenizer, held_loss(), device)


@torch.no_grad()
def finish(args, model, tokenizer, held_out: float, device: str) -> None:
    """Check the fast pass against transformers', save in bf16, and let the model speak."""
    from recipes.tiny_hybrid import model as hybrid

    model.eval()
    ids = torch.randint(8, model.config.vocab_size, (1, 64), device=device)
    ours, theirs = hybrid.forward(model, ids)[0], model(ids).logits
    apart = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    # one expert chosen differently at a near tie moves a logit; a wrong formula moves all of them
    if apart > 0.05:
        raise SystemExit(f"the fast forward pass is {apart:.3f} away from transformers'")
    biases = [b.feed_forward.expert_bias for b in model.model.layers[2:]]
    model = model.to(torch.bfloat16)
    for block, bias in zip(model.model.layers[2:], biases):
        block.feed_forward.expert_bias = bias.float()  # the selection stays in fp32
    model.config.dtype = torch.bfloat16
    fresh = args.work / "bf16.tmp"
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    samples = []
    for prompt in SAMPLES:
        text = prompt
        if prompt.endswith("."):
            chat = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        start = tokenizer(text, add_special_tokens=text == prompt, return_tensors="pt")["input_ids"]
        out = model.generate(
            start.to(device), max_new_tokens=32 if args.tiny else 120, do_sample=False
        )
        samples.append(tokenizer.decode(out[0]))
        print("---", samples[-1], sep="\n", flush=True)
    bias = torch.stack([b.cpu() for b in biases])
    log(args.work, "trained", held_out=round(held_out, 4), perplexity=round(math.exp(held_out), 3),
        parameters=sum(p.numel() for p in model.parameters()), apart_from_transformers=apart,
        expert_bias=[round(bias.min().item(), 4), round(bias.max().item(), 4)],
        samples=samples)  # fmt: skip
    os.replace(fresh, args.work / "bf16")


# ------------------------------------------------------------------------------------------- pack


def pack(args) -> None:
    """Everything worth bringing home, as OUT/tiny-hybrid.tar.NN of at most 12 MiB each."""
    args.out.mkdir(parents=True, exist_ok=True)
    archive = args.work / "tiny-hybrid.tar"
    with tarfile.open(archive, "w") as tar:
        for name in ("log.jsonl", "bf16", "text"):
            if (args.work / name).exists():
                tar.add(args.work / name, name)
    with open(archive, "rb") as f:
        for number in range(100):
            if not (piece := f.read(PART_BYTES)):
                break
            (args.out / f"tiny-hybrid.tar.{number:02d}").write_bytes(piece)
    archive.unlink()
    print(f"unpack with: cat {args.out}/tiny-hybrid.tar.* | tar x -C DIR", flush=True)


def flags_of(args) -> list[str]:
    """The options for a process that does one of the steps."""
    values = {k.replace("_", "-"): v for k, v in vars(args).items() if v is not None}
    for name in ("step", "writer", "tiny"):
        del values[name]
    return [f"--{k}={v}" for k, v in values.items()] + ["--tiny"] * args.tiny


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=["text", "writer", "train", "pack", "all"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smollm2", type=Path, help="dense folder (recipes/smollm2.py)")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--text-seconds", type=float, default=200)
    parser.add_argument("--writers", type=int, default=4, help="engines at once")
    parser.add_argument("--writer", type=int, default=0, help="which of them this process is")
    parser.add_argument("--max-waves", type=int, default=32)
    parser.add_argument("--train-seconds", type=float, default=240)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.step == "all":
        # a process a step: the engines' memory is surely given back before training
        run = lambda step: subprocess.run(
            [sys.executable, "-m", __spec__.name, step, *flags_of(args)], check=True
        )
        try:
            run("text")
            run("train")
        finally:
            run("pack")  # whatever there is, so that a failed step costs only itself
        return
    {"text": text, "writer": write_text, "train": train, "pack": pack}[args.step](args)


if __name__ == "__main__":
    main()
