"""
Time and memory of the MISO attention operator alone, against its rivals and as contexts and chunks grow in number.

    python -m benchmarks.attention --quick                                  # 1k to 4k tokens, a minute or two on 2 cores
    python -m benchmarks.attention --plot growth.png --json attention.json  # 1k to 32k tokens, with a picture
    python -m benchmarks.attention --device cuda                            # bfloat16, with FlexAttention

Every figure is the median of `--repeats` runs. Runs alternate between the rivals, after one run of each that measures its
memory. Once a rival other than MISO and its baseline takes more than `--patience` seconds, it is skipped at greater lengths.
Times are wall-clock times of the forward and of forward plus backward; CUDA is synchronized after each. The dtype is float32
on a CPU, bfloat16 on CUDA.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import send_to_device
from rich.console import Console
from rich.table import Table
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from benchmarks.common.measure import ceiling, machine, peak_memory, write_json
from trl_miso.attention.kernels import KernelOptions, resolve_kernel
from trl_miso.attention.mixture import PairsForm, miso_attention
from trl_miso.attention.rotation import ModelRotation
from trl_miso.segments import Example, parallel, single, successive, unshare
from trl_miso.segments.packed import PackedSegments, pack

MISO, PAIRS, DENSE, FLEX = "MISO", "MISO, pairs form", "dense masked SDPA", "FlexAttention"
EQUAL_PAIRS, EQUAL_TOKENS = "plain causal, equal pairs", "plain causal, equal tokens"
DENSE_LIMIT = 4e9  # bytes
NOTE = (
    "Pairs: score pairs that a rival computes, T x T for dense masked SDPA. Dense masked SDPA and FlexAttention take one "
    "softmax over all contexts. MISO takes one softmax per branch, so a dense implementation of MISO would cost more. "
    "Ratio: time relative to one plain causal sequence with as many pairs. Memory: peak above q, k, v and dout, including "
    "outputs, gradients and the dense mask. FLOP: 4 D H per pair forward, 10 D H backward. mm: product of two 2048 x 2048 "
    "matrices."
)
COLUMNS = {  # field of a record: (heading, factor, format)
    "length": ("length", 1, ",d"),
    "rival": ("rival", 1, ""),
    "number": ("n", 1, "d"),
    "kind": ("", 1, ""),
    "tokens": ("tokens", 1, ",d"),
    "pairs": ("pairs, M", 1e-6, ",.2f"),
    "forward": ("fwd, ms", 1e3, ",.1f"),
    "total": ("fwd+bwd, ms", 1e3, ",.1f"),
    "ratio": ("ratio", 1, ".2f"),
    "pairs_ratio": ("pairs ratio", 1, ".2f"),
    "peak": ("peak, MB", 1e-6, ",.0f"),
    "flops": ("GFLOP/s", 1e-9, ",.1f"),
    "share": ("of mm", 1, ".0%"),
}


class Bench:
    """Device, sizes and kernel shared by all runs. `ceiling`: FLOP/s of a matrix product."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
        self.heads, self.kv_heads, self.head_dim = options.heads, options.kv_heads, options.head_dim
        self.repeats, self.patience = options.repeats, options.patience
        self.options = KernelOptions(self.head_dim**-0.5)
        self.kernel = resolve_kernel("auto", "sdpa", self.device, self.dtype, self.head_dim, self.options)
        config = LlamaConfig(head_dim=self.head_dim, num_attention_heads=self.heads)
        self.rotation = ModelRotation(LlamaRotaryEmbedding(config).to(self.device), None, apply_rotary_pos_emb)
        self.ceiling = ceiling(options.device, self.dtype)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def inputs(self, tokens: int) -> list[torch.Tensor]:
        """q, k and v, which require gradients, and dout, each (tokens, heads, head_dim)."""
        heads = self.heads, self.kv_heads, self.kv_heads, self.heads
        *leaves, dout = (torch.randn(tokens, n, self.head_dim, device=self.device, dtype=self.dtype) for n in heads)
        return [*(x.requires_grad_() for x in leaves), dout]


class Workload(NamedTuple):
    """A packed batch on the device. `sees(q, kv)`: whether query row q sees key row kv in any branch."""

    tokens: int
    packed: PackedSegments
    sees: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Rival(NamedTuple):
    """An implementation of attention, `attend(q, k, v)`. A rival that is not run has None and a `reason`. `mask`: bytes."""

    name: str
    tokens: int
    pairs: int | None = None
    attend: Callable[..., torch.Tensor] | None = None
    mask: int = 0
    reason: str = ""


def para(length: int) -> list[Example]:
    """Crab-shaped examples of about `length` tokens in total. Contexts: full prompt, each of 7 constraints, bare prompt."""
    prompt, constraints = list(range(60)), [list(range(100 * i, 100 * i + 20)) for i in range(1, 8)]
    lists = [prompt + sum(constraints, []), *(prompt + constraint for constraint in constraints), prompt]
    example = parallel(lists, 300, [1 / len(lists)] * len(lists), "successive")[1]
    return [example] * max(1, round(length / example.num_tokens))


def succ(length: int, chunks: int = 4, output: int = 512) -> list[Example]:
    """One input in equal chunks and an output, `length` tokens in total."""
    return [single(length) if chunks == 1 else successive([(length - output) // chunks] * chunks, output)]


def contexts(number: int, prefix: int, extra: int, output: int, shared: bool) -> list[Example]:
    """One example of `number` contexts, each `prefix` common tokens and `extra` tokens of its own; `shared`: compute the prefix once."""
    if number == 1:
        return [single(prefix + extra + output)]
    lists = [[*range(prefix), *range(prefix + extra * i, prefix + extra * (i + 1))] for i in range(number)]
    example = parallel(lists, output, [1 / number] * number, "successive")[1]
    return [example if shared else unshare(example, [])[0]]


def workload(examples: Sequence[Example], device: torch.device) -> Workload:
    """Pack the examples, with the fields of both forms of the operator, and derive `sees` from two numbers per row."""
    order, _, packed = pack(examples, "uniform", window=1)
    call = packed.self_call
    keys = torch.arange(len(order)) if call.kv_index is None else call.kv_index
    ends = call.cu_seqlens_q[1:].long().repeat_interleave(call.cu_seqlens_k.diff())
    # Segments lie in depth-first order: a key is visible from its own row to the last row of the subtree under its segment.
    last = torch.zeros(len(order), dtype=torch.long).scatter_reduce(0, keys, ends, "amax").to(device)
    sizes = torch.tensor([example.num_tokens for example in examples])
    owner = torch.arange(len(examples)).repeat_interleave(sizes)[torch.from_numpy(order)].to(device)
    start, end = packed.output_start, packed.output_end

    def sees(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        mixes = (q >= start) & (q < end) & (owner[q] == owner[kv])
        return (kv <= q) & ((q < last[kv]) | mixes)

    return Workload(len(order), PackedSegments.from_batch(send_to_device(packed.to_batch(), device)), sees)


def ours(work: Workload, bench: Bench, name: str = MISO) -> Rival:
    """The operator in either form. Where no example mixes contexts this is plain causal attention by the same kernel."""
    packed = work.packed
    pairs, attend = packed.self_call.score_pairs(causal=True), miso_attention
    if name == PAIRS:
        pairs, attend = pairs + packed.pairs_call.score_pairs(causal=True), PairsForm.apply
    elif packed.num_mixed:
        pairs += packed.cross_call.score_pairs(causal=False)
    arguments = packed, bench.kernel, bench.options, bench.rotation
    return Rival(name, work.tokens, pairs, lambda q, k, v: attend(q, k, v, *arguments))


def dense(work: Workload, bench: Bench) -> Rival:
    """SDPA with a dense mask. Keys and values are repeated for their query heads, as transformers does with a mask."""
    needed = work.tokens**2 * (1 + bench.dtype.itemsize)
    if needed > DENSE_LIMIT:
        reason = f"not run, its masks of {work.tokens:,} tokens, boolean and {bench.dtype}, take {needed / 1e9:.1f} GB"
        return Rival(DENSE, work.tokens, reason=reason)
    rows = torch.arange(work.tokens, device=bench.device)
    mask = work.sees(rows[:, None], rows)

    def attend(q, k, v):
        k, v = (x.repeat_interleave(bench.heads // bench.kv_heads, 1) for x in (k, v))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)

    return Rival(DENSE, work.tokens, work.tokens**2, attend, mask.nbytes)


def flex(work: Workload, bench: Bench) -> Rival:
    """FlexAttention, compiled for this length, with a block mask."""
    if bench.device.type != "cuda":
        return Rival(FLEX, work.tokens, reason="not run, it needs CUDA to train")
    torch.compiler.reset()  # torch stops compiling one function after eight shapes
    sizes = 1, 1, work.tokens, work.tokens
    mask = create_block_mask(lambda b, h, q, kv: work.sees(q, kv), *sizes, device=bench.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    rows = torch.arange(work.tokens, device=bench.device)
    pairs = int(work.sees(rows[:, None], rows).sum())

    def attend(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return Rival(FLEX, work.tokens, pairs, attend)


def rivals_of(work: Workload, bench: Bench, slow: dict[str, str]) -> list[Rival]:
    """All rivals on a workload; those in `slow` (name: reason) are not run."""
    mine = ours(work, bench)
    equal = round(((8 * mine.pairs + 1) ** 0.5 - 1) / 2)  # L (L + 1) / 2 pairs
    makers = {
        MISO: lambda: mine,
        PAIRS: lambda: ours(work, bench, PAIRS),
        EQUAL_PAIRS: lambda: ours(workload([single(equal)], bench.device), bench, EQUAL_PAIRS),
        EQUAL_TOKENS: lambda: ours(workload([single(work.tokens)], bench.device), bench, EQUAL_TOKENS),
        DENSE: lambda: dense(work, bench),
        FLEX: lambda: flex(work, bench),
    }
    return [Rival(name, work.tokens, reason=slow[name]) if name in slow else make() for name, make in makers.items()]


def step(rival: Rival, inputs: list[torch.Tensor], bench: Bench) -> tuple[float, float]:
    """Seconds of a forward, and of a forward and backward to q, k and v."""
    *leaves, dout = inputs
    start = bench.now()
    out = rival.attend(*leaves)
    middle = bench.now()
    torch.autograd.grad(out, leaves, dout)
    return middle - start, bench.now() - start


def measure(rivals: Sequence[Rival], bench: Bench) -> list[dict]:
    """One record per rival: seconds, peak bytes and FLOP/s, or the reason why it was not run."""
    inputs = {rival.tokens: bench.inputs(rival.tokens) for rival in rivals if rival.attend}
    runs = {r.name: lambda r=r: step(r, inputs[r.tokens], bench) for r in rivals if r.attend}
    peaks = {name: peak_memory(run, bench.device.type) for name, run in runs.items()}
    rounds = [{name: run() for name, run in runs.items()} for _ in range(bench.repeats)]
    records = []
    for r in rivals:
        record = {"rival": r.name, "tokens": r.tokens, "pairs": r.pairs}
        records.append(record)
        if r.attend is None:
            record["reason"] = r.reason
            continue
        forward, total = map(statistics.median, zip(*(times[r.name] for times in rounds), strict=True))
        flops = 14 * bench.head_dim * bench.heads * r.pairs / total
        record |= {"forward": forward, "total": total, "flops": flops, "share": flops / bench.ceiling}
        peak = peaks[r.name]
        record["peak"] = None if peak is None else peak + r.mask
    return records


def show(console: Console, title: str, records: list[dict]) -> None:
    """Print the columns that some record has, and why rivals were not run."""
    table = Table(title=title, title_justify="left", box=None)
    fields = [field for field in COLUMNS if any(field in record for record in records)]
    for field in fields:
        table.add_column(COLUMNS[field][0], justify="left" if COLUMNS[field][2] == "" else "right", no_wrap=True)
    for record in records:
        shown = [(record.get(field), *COLUMNS[field][1:]) for field in fields]
        table.add_row(*("-" if value is None else format(value * factor, how) for value, factor, how in shown))
    console.print("", table)
    for reason in dict.fromkeys(f"- {r['rival']}: {r['reason']}" for r in records if "reason" in r):
        console.print(reason)


def compare(name: str, make: Callable[[int], list[Example]], lengths: Sequence[int], bench: Bench) -> list[dict]:
    """Records of every rival at every length, with the ratio to plain causal attention over as many pairs."""
    records, slow = [], {}
    for length in lengths:
        at_length = measure(rivals_of(workload(make(length), bench.device), bench, slow), bench)
        base = next(record for record in at_length if record["rival"] == EQUAL_PAIRS)
        for record in at_length:
            record |= {"workload": name, "length": length}
            if "total" in record:
                record["ratio"] = record["total"] / base["total"]
                if record["total"] > bench.patience and record["rival"] not in (MISO, EQUAL_PAIRS):
                    slow[record["rival"]] = f"not run beyond {length:,}, where it took over {bench.patience:g} s"
        records += at_length
    return records


def grow(batches: dict[tuple[int, str], list[Example]], bench: Bench) -> list[dict]:
    """Records of MISO on batches keyed by (number of contexts or chunks, kind), with ratios to the first batch."""
    records = measure([ours(workload(e, bench.device), bench, str(key)) for key, e in batches.items()], bench)
    for record, (number, kind) in zip(records, batches, strict=True):
        record |= {"number": number, "kind": kind, "ratio": record["total"] / records[0]["total"]}
        record["pairs_ratio"] = record["pairs"] / records[0]["pairs"]
        del record["rival"]
    return records


def draw(file: Path, lengths: list[dict], by_contexts: list[dict], by_chunks: list[dict]) -> None:
    """Draw three panels: contexts, chunks and lengths. Needs matplotlib: `pip install 'trl-miso[plots]'`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, middle, right = panels = figure.subplots(1, 3)
    for panel in panels:  # colours that colour-blind readers can tell apart, and markers that need no colour
        panel.set_prop_cycle(color=("#0072B2", "#D55E00", "black", "#CC79A7"), marker=tuple("os^D"))

    def line(panel, records: list[dict], x: str, y: str, label: str) -> None:
        panel.plot([r[x] for r in records], [r[y] * COLUMNS[y][1] for r in records], label=label)

    for kind in ("shared", "separate"):
        line(left, [r for r in by_contexts if r["kind"] == kind], "number", "total", f"{kind} prefix")
    left.set(title="Contexts of one output", xlabel="contexts", ylabel="forward + backward, ms", ylim=0)
    line(middle, by_chunks, "number", "ratio", "time")
    line(middle, by_chunks, "number", "pairs_ratio", "score pairs")
    numbers = [r["number"] for r in by_chunks]
    middle.plot(numbers, [1 / number for number in numbers], "k--", marker="", label="1 / chunks")
    middle.set(title="Chunks of one input", xlabel="chunks", ylabel="relative to one chunk", ylim=0, xscale="log")
    middle.set_xticks(numbers, map(str, numbers))
    for work, rival in ("para", MISO), ("succ", MISO), ("succ", EQUAL_TOKENS), ("succ", DENSE):
        chosen = [r for r in lengths if (r["workload"], r["rival"]) == (work, rival) and "total" in r]
        line(right, chosen, "tokens", "total", f"{rival}, {work}" if rival == MISO else rival)
    right.set(title="Length", xlabel="tokens", ylabel="forward + backward, ms", xscale="log", yscale="log")
    ticks = {r["length"]: f"{r['length'] // 1024}k" for r in lengths}
    right.set_xticks(list(ticks), ticks.values())
    for panel in panels:
        panel.xaxis.minorticks_off()
        panel.legend(frameon=False, fontsize=8)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="1k to 4k tokens, fewer repeats")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="needs matplotlib")
    parser.add_argument("--json", type=Path, metavar="FILE")
    for name, kind in (("repeats", int), ("patience", float), ("heads", int), ("kv_heads", int), ("head_dim", int)):
        parser.add_argument(f"--{name}", type=kind)
    given = vars(parser.parse_args())
    sizes = (8, 2, 64) if given["device"] == "cpu" else (32, 8, 128)
    defaults = {"repeats": 3, "patience": 0.5} if given["quick"] else {"repeats": 5, "patience": 30.0}
    defaults |= dict(zip(("heads", "kv_heads", "head_dim"), sizes, strict=True))
    return argparse.Namespace(**{name: defaults.get(name) if x is None else x for name, x in given.items()})


def main() -> None:
    options = parse()
    bench, console = Bench(options), Console(width=120, highlight=False)
    sizes = f"{bench.dtype}, H={bench.heads} G={bench.kv_heads} D={bench.head_dim}, kernel {bench.kernel.name}"
    setting = f"{machine(options.device)}\n{sizes}; matrix product: {bench.ceiling / 1e9:,.0f} GFLOP/s"
    print(setting)
    # Warm up: first calls load libraries, whose memory must not count as a rival's.
    measure(rivals_of(workload(para(1), bench.device), bench, {}), bench)

    lengths = [1024 * 2**i for i in range(3 if options.quick else 6)]
    by_length = compare("para", para, lengths, bench)
    show(console, "para: Crab-shaped examples, 9 contexts with shared prefixes and position offsets", by_length)
    by_length += (added := compare("succ", succ, lengths, bench))
    show(console, "succ: one input in 4 chunks with an output of 512", added)
    console.print(f"\n{NOTE}")

    prefix, extra, output, total = (192, 64, 256, 2048) if options.quick else (768, 256, 512, 8192)
    keys = [(n, kind) for kind in ("shared", "separate") for n in (1, 2, 4, 8, 16)]
    by_contexts = grow({(n, kind): contexts(n, prefix, extra, output, kind == "shared") for n, kind in keys}, bench)
    show(console, f"MISO on n contexts of {prefix} common and {extra} own tokens, an output of {output}", by_contexts)
    by_chunks = grow({(k, f"1/n = {1 / k:g}"): succ(total, k, total // 16) for k in (1, 2, 4, 8)}, bench)
    show(console, f"MISO on n chunks of one input, {total} tokens with an output of {total // 16}", by_chunks)
    write_json(options.json, {"setting": setting, "lengths": by_length, "contexts": by_contexts, "chunks": by_chunks})
    if options.plot:
        draw(options.plot, by_length, by_contexts, by_chunks)


if __name__ == "__main__":
    main()
