"""
MISO attention alone, forward and backward, beside what a user would run instead; how it grows with contexts and chunks.

    python benchmarks/attention.py --quick                                  # lengths 1k to 4k, under a minute on 2 cores
    python benchmarks/attention.py --plot growth.png --json attention.json  # lengths 1k to 32k, with a picture
    python benchmarks/attention.py --device cuda                            # bfloat16, with FlexAttention

Every figure is the median of `--repeats` runs, which alternate between the rivals, after a run of each that measures its
memory. A rival that took longer than `--patience` seconds is not run at greater lengths. Times are wall-clock times; on
CUDA the device is synchronized after the forward and after the backward. The dtype is float32 on CPU.
"""

import argparse
import ctypes
import json
import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import trl_miso
from trl_miso.attention.kernels import resolve_kernel
from trl_miso.attention.mixture import KernelOptions, _Pairs, miso_attention
from trl_miso.packing import PackedSegments, Varlen, pack
from trl_miso.segments import Example, parallel, single, successive, unshare

MISO, PAIRS, DENSE, FLEX = "MISO", "MISO, pairs form", "dense masked SDPA", "FlexAttention"
EQUAL_PAIRS, EQUAL_TOKENS = "plain causal, equal pairs", "plain causal, equal tokens"
SUCC_OUTPUT, CHUNKS = 512, 4
DENSE_LIMIT = 4e9  # bytes
NOTE = """
Pairs: the score pairs that a rival computes, T x T for dense masked SDPA. It and FlexAttention have the mask of one softmax
over all contexts; MISO's branches are not one softmax, so a dense implementation of them costs more. Ratio: to one plain
causal sequence with as many pairs. Memory: peak above q, k, v and dout; with outputs, gradients, masks and index tensors.
FLOP: 4 D H pairs forward, 10 D H pairs backward."""
COLUMNS = {  # field of a record: heading, factor, format
    "length": ("length", 1, ",d"),
    "rival": ("rival", 1, ""),
    "number": ("n", 1, "d"),
    "layout": ("prefixes", 1, ""),
    "ideal": ("1 / n", 1, ".3f"),
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
    """Device, sizes and kernel that all runs share; `ceiling`: FLOP/s of a matrix product."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
        self.heads, self.kv_heads, self.head_dim = options.heads, options.kv_heads, options.head_dim
        self.repeats, self.patience = options.repeats, options.patience
        self.options = KernelOptions(self.head_dim**-0.5)
        self.kernel = resolve_kernel("auto", False, self.device, self.dtype, self.head_dim, self.options)
        self.ceiling = self.matrix_product(2048)

    def rotation(self, x_NHD: torch.Tensor, offset_N: torch.Tensor) -> torch.Tensor:
        """Rotary embedding in the half layout by (N,) positions, as models apply it to queries."""
        frequency = 10000.0 ** -(torch.arange(0, self.head_dim, 2, device=self.device) / self.head_dim)
        angle = offset_N[:, None] * frequency
        cos, sin = (torch.cat([f(angle)] * 2, -1)[:, None].to(x_NHD.dtype) for f in (torch.cos, torch.sin))
        first, second = x_NHD.chunk(2, -1)
        return x_NHD * cos + torch.cat([-second, first], -1) * sin

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def inputs(self, tokens: int) -> list[torch.Tensor]:
        """q, k and v, which need gradients, and dout: (tokens, heads, head_dim)."""
        heads = self.heads, self.kv_heads, self.kv_heads, self.heads
        *leaves, dout = (torch.randn(tokens, n, self.head_dim, device=self.device, dtype=self.dtype) for n in heads)
        return [*(x.requires_grad_() for x in leaves), dout]

    def matrix_product(self, n: int) -> float:
        a, b = (torch.randn(n, n, device=self.device, dtype=self.dtype) for _ in range(2))
        seconds = []
        for _ in range(self.repeats + 1):
            start = self.now()
            torch.mm(a, b)
            seconds.append(self.now() - start)
        return 2 * n**3 / statistics.median(seconds[1:])


@dataclass(frozen=True)
class Workload:
    """A packed batch on the device. `sees` takes query and key rows: is the key visible, in any branch?"""

    tokens: int
    packed: PackedSegments
    sees: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Rival:
    """`attend(q, k, v)`, or None for what is not run and the `reason`; `held`: bytes of its masks and index tensors."""

    name: str
    tokens: int
    pairs: int | None = None
    attend: Callable[..., torch.Tensor] | None = None
    held: int = 0
    reason: str = ""


def para(length: int) -> list[Example]:
    """Crab-shaped examples, together about `length` tokens: the full prompt, 7 constraints alone, the bare prompt."""
    prompt, constraints = list(range(60)), [list(range(100 * i, 100 * i + 20)) for i in range(1, 8)]
    lists = [prompt + sum(constraints, []), *(prompt + constraint for constraint in constraints), prompt]
    example = parallel(lists, 300, [1 / len(lists)] * len(lists), "successive")[1]
    return [example] * max(1, round(length / example.num_tokens))


def succ(length: int, chunks: int = CHUNKS, output: int = SUCC_OUTPUT) -> list[Example]:
    """One input in equal chunks with an output, `length` tokens together."""
    return [single(length) if chunks == 1 else successive([(length - output) // chunks] * chunks, output)]


def contexts(number: int, prefix: int, own: int, output: int, shared: bool) -> list[Example]:
    """One example of so many contexts, each `prefix` tokens that all have and `own` tokens that only it has."""
    if number == 1:
        return [single(prefix + own + output)]
    lists = [[*range(prefix), *range(prefix + own * i, prefix + own * (i + 1))] for i in range(number)]
    example = parallel(lists, output, [1 / number] * number, "successive")[1]
    return [example if shared else unshare(example, [])[0]]


def workload(examples: Sequence[Example], device: torch.device) -> Workload:
    """Pack, with the fields of both forms, and describe who sees whom by two numbers a row."""
    order, _, packed = pack(examples, "uniform", window=1)
    call = packed.self_call
    keys = torch.arange(len(order)) if call.kv_index is None else call.kv_index
    ends = call.cu_seqlens_q[1:].long().repeat_interleave(call.cu_seqlens_k.diff())
    # Segments lie in depth-first order: a row is seen from its own place to the end of what lies below its segment.
    last = torch.zeros(len(order), dtype=torch.long).scatter_reduce(0, keys, ends, "amax").to(device)
    sizes = torch.tensor([example.num_tokens for example in examples])
    owner = torch.arange(len(examples)).repeat_interleave(sizes)[torch.from_numpy(order)].to(device)
    start, end = packed.output_start, packed.output_end

    def sees(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        mixes = (q >= start) & (q < end) & (owner[q] == owner[kv])
        return (kv <= q) & ((q < last[kv]) | mixes)

    moved = {key: x.to(device) if torch.is_tensor(x) else x for key, x in packed.to_batch().items()}
    return Workload(len(order), PackedSegments.from_batch(moved), sees)


def score_pairs(call: Varlen, causal: bool) -> int:
    """Query-key pairs of a call; a causal call aligns the last query with the last key."""
    n_q, n_k = call.cu_seqlens_q.diff().long(), call.cu_seqlens_k.diff().long()
    return int((n_q * n_k - causal * (n_q * (n_q - 1) // 2)).sum())


def nbytes(holder: object) -> int:
    return sum(x.nbytes for x in vars(holder).values() if torch.is_tensor(x))


def ours(work: Workload, bench: Bench, name: str = MISO) -> Rival:
    """The operator in either form; where no example mixes contexts, plain causal attention by the same kernel."""
    packed = work.packed
    pairs = score_pairs(packed.self_call, True)
    if name == PAIRS:
        attend, held = _Pairs.apply, nbytes(packed)
        pairs += score_pairs(packed.pairs_call, True)
    else:
        without = replace(packed, pair_cu_seqlens_k=None, pair_kv_index=None, pair_kv_offset=None)
        attend, held = miso_attention, nbytes(without)
        pairs += score_pairs(packed.cross_call, False) if packed.num_mixed else 0
    arguments = packed, bench.kernel, bench.options, bench.rotation
    return Rival(name, work.tokens, pairs, lambda q, k, v: attend(q, k, v, *arguments), held)


def dense(work: Workload, bench: Bench) -> Rival:
    """Keys and values are repeated for their query heads, as transformers does when there is a mask."""
    needed = work.tokens**2 * (1 + bench.dtype.itemsize)
    if needed > DENSE_LIMIT:
        return Rival(DENSE, work.tokens, reason=f"its mask, boolean and {bench.dtype}, takes {needed / 1e9:.1f} GB")
    rows = torch.arange(work.tokens, device=bench.device)
    mask = work.sees(rows[:, None], rows)

    def attend(q, k, v):
        k, v = (x.repeat_interleave(bench.heads // bench.kv_heads, 1) for x in (k, v))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)

    return Rival(DENSE, work.tokens, work.tokens**2, attend, mask.nbytes)


def flex(work: Workload, bench: Bench) -> Rival:
    if bench.device.type != "cuda":
        return Rival(FLEX, work.tokens, reason="it needs CUDA, on CPU it cannot train")
    torch.compiler.reset()  # every length is compiled, and torch gives up after eight shapes of one function
    size = work.tokens, work.tokens
    blocks = create_block_mask(lambda b, h, q, kv: work.sees(q, kv), None, None, *size, device=bench.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    rows = torch.arange(work.tokens, device=bench.device)
    pairs = sum(int(work.sees(part[:, None], rows).sum()) for part in rows.split(1024))

    def attend(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(q, k, v, block_mask=blocks, enable_gqa=True)[0].transpose(0, 1)

    return Rival(FLEX, work.tokens, pairs, attend, nbytes(blocks))


def rivals_of(work: Workload, bench: Bench, slow: dict[str, str]) -> list[Rival]:
    """All rivals on a workload, without those in `slow`: name and reason."""
    mine = ours(work, bench)
    equal = round((math.sqrt(8 * mine.pairs + 1) - 1) / 2)  # L (L + 1) / 2 pairs
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
    """Seconds of a forward, and of it with its backward to q, k and v."""
    *leaves, dout = inputs
    start = bench.now()
    out = rival.attend(*leaves)
    middle = bench.now()
    torch.autograd.grad(out, leaves, dout)
    return middle - start, bench.now() - start


def measure(rivals: Sequence[Rival], bench: Bench) -> list[dict]:
    """Records: seconds, bytes at the peak, floating-point operations a second; the reason of what was not run."""
    inputs = {rival.tokens: bench.inputs(rival.tokens) for rival in rivals if rival.attend}
    runs = {r.name: lambda r=r: step(r, inputs[r.tokens], bench) for r in rivals if r.attend}
    peaks = {name: peak_memory(run, bench.device) for name, run in runs.items()}
    rounds = [{name: run() for name, run in runs.items()} for _ in range(bench.repeats)]
    records = []
    for rival in rivals:
        record = {"rival": rival.name, "tokens": rival.tokens, "pairs": rival.pairs}
        if rival.attend:
            forward, total = map(statistics.median, zip(*(times[rival.name] for times in rounds), strict=True))
            flops = 14 * bench.head_dim * bench.heads * rival.pairs / total
            record |= {"forward": forward, "total": total, "flops": flops, "share": flops / bench.ceiling}
            record["peak"] = peaks[rival.name] and peaks[rival.name] + rival.held
        else:
            record["reason"] = rival.reason
        records.append(record)
    return records


def peak_memory(work: Callable, device: torch.device) -> int | None:
    """Peak bytes above those held before: torch's own count on CUDA, resident memory elsewhere (Linux with glibc)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    libc, reset = ctypes.CDLL(None), Path("/proc/self/clear_refs")
    if not (hasattr(libc, "mallopt") and reset.exists()):
        work()
        return None
    # Freed blocks go back to the system at once, so that none that the run takes was resident before it.
    trim_threshold, mmap_threshold = -1, -3  # as in malloc.h
    libc.mallopt(mmap_threshold, 1 << 16)
    libc.malloc_trim(0)
    reset.write_text("5")
    before = resident("VmRSS")
    work()
    peak = resident("VmHWM") - before
    libc.mallopt(mmap_threshold, 1 << 25)  # where glibc's own adaptation arrives when large blocks come and go
    libc.mallopt(trim_threshold, 1 << 26)
    return peak


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def show(console: Console, title: str, records: list[dict]) -> None:
    """The columns that some record has, and why some were not run."""
    table = Table(title=title, title_justify="left", box=None)
    fields = [field for field in COLUMNS if any(field in record for record in records)]
    for field in fields:
        table.add_column(COLUMNS[field][0], justify="left" if COLUMNS[field][2] == "" else "right", no_wrap=True)
    for record in records:
        shown = [(record.get(field), *COLUMNS[field][1:]) for field in fields]
        table.add_row(*("-" if value is None else format(value * factor, how) for value, factor, how in shown))
    console.print("", table)
    reasons = {f"- {r['rival']}, length {r['length']:,}: {r['reason']}": None for r in records if "reason" in r}
    if reasons:
        console.print("\n".join(reasons))


def compare(name: str, make: Callable[[int], list[Example]], lengths: Sequence[int], bench: Bench) -> list[dict]:
    """Every rival at every length."""
    records: list[dict] = []
    slow: dict[str, str] = {}
    for length in lengths:
        made = measure(rivals_of(workload(make(length), bench.device), bench, slow), bench)
        base = next(record for record in made if record["rival"] == EQUAL_PAIRS).get("total")
        for record in made:
            total = record.get("total")
            records.append({"workload": name, "length": length, "ratio": total and base and total / base} | record)
            if total and total > bench.patience:
                slow[record["rival"]] = f"it took more than {bench.patience:g} s at length {length:,}"
    return records


def grow(batches: dict[tuple[int, str], list[Example]], bench: Bench) -> list[dict]:
    """MISO on batches that are named by a number of contexts and a layout, relative to the first."""
    records = measure([ours(workload(e, bench.device), bench, str(key)) for key, e in batches.items()], bench)
    for record, (number, layout) in zip(records, batches, strict=True):
        del record["rival"]
        record |= {"number": number} | ({"layout": layout} if layout else {"ideal": 1 / number})
        record |= {f: record[of] / records[0][of] for f, of in (("ratio", "total"), ("pairs_ratio", "pairs"))}
    return records


def draw(file: Path, lengths: list[dict], by_contexts: list[dict], by_chunks: list[dict]) -> None:
    """Three panels: time by contexts, by chunks and by length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Colours that colour-blind readers tell apart, and markers that do without.
    styles = [
        {"color": c, "marker": m} for c, m in zip(("#0072B2", "#D55E00", "black", "#CC79A7"), "os^D", strict=True)
    ]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(10, 3.6), layout="constrained")

    def line(panel, records: list[dict], x: str, y: str, label: str, style: int) -> None:
        factor = COLUMNS[y][1]
        panel.plot([r[x] for r in records], [r[y] * factor for r in records], label=label, **styles[style])

    for style, (layout, label) in enumerate((("shared", "prefix shared"), ("separate", "a copy each"))):
        line(left, [r for r in by_contexts if r["layout"] == layout], "number", "total", label, style)
    left.set(title="Contexts of one output", xlabel="contexts", ylabel="forward + backward, ms", ylim=0)
    line(middle, by_chunks, "number", "ratio", "time", 0)
    line(middle, by_chunks, "number", "pairs_ratio", "score pairs", 1)
    numbers = [r["number"] for r in by_chunks]
    middle.plot(numbers, [1 / number for number in numbers], "k--", label="1 / chunks")
    middle.set(title="Chunks of one input", xlabel="chunks", ylabel="relative to one chunk", ylim=0, xscale="log")
    middle.set_xticks(numbers, map(str, numbers))
    shown = ("para", MISO), ("succ", MISO), ("succ", EQUAL_TOKENS), ("succ", DENSE)
    for style, (work, rival) in enumerate(shown):
        chosen = [r for r in lengths if (r["workload"], r["rival"]) == (work, rival) and "total" in r]
        line(right, chosen, "tokens", "total", f"{rival}, {work}" if rival == MISO else rival, style)
    right.set(title="Length", xlabel="tokens", ylabel="forward + backward, ms", xscale="log", yscale="log")
    ticks = sorted({r["length"] for r in lengths})
    right.set_xticks(ticks, [f"{tick // 1024}k" for tick in ticks])
    for panel in (left, middle, right):
        panel.xaxis.minorticks_off()
        panel.legend(frameon=False, fontsize=8)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--json", type=Path, metavar="FILE")
    for name, kind in (("repeats", int), ("patience", float), ("heads", int), ("kv_heads", int), ("head_dim", int)):
        parser.add_argument(f"--{name}", type=kind)
    options = parser.parse_args()
    sizes = (8, 2, 64) if options.device == "cpu" else (32, 8, 128)
    defaults = dict(zip(("heads", "kv_heads", "head_dim"), sizes, strict=True))
    defaults |= {"repeats": 3, "patience": 0.5} if options.quick else {"repeats": 5, "patience": 30.0}
    given = {name: value for name, value in vars(options).items() if value is not None}
    return argparse.Namespace(**{"plot": None, "json": None} | defaults | given)


def main() -> None:
    options = parse()
    bench, console = Bench(options), Console(width=120, highlight=False)
    device = bench.device
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    setting = (
        f"torch {torch.__version__}, trl_miso {trl_miso.__version__}, {name}, {torch.get_num_threads()} threads, {bench.dtype}, "
        f"H={bench.heads} G={bench.kv_heads} D={bench.head_dim}, kernel {bench.kernel.name}, "
        f"mm {bench.ceiling / 1e9:,.0f} GFLOP/s: python {shlex.join(sys.argv)}"
    )
    console.print(setting, soft_wrap=True)
    for rival in rivals_of(workload(para(1), device), bench, {}):
        if rival.attend:
            step(rival, bench.inputs(rival.tokens), bench)  # loads libraries, which are no rival's memory

    lengths = [1024 * 2**i for i in range(3 if options.quick else 6)]
    by_length = compare("para", para, lengths, bench)
    show(console, "para: Crab-shaped examples, 9 contexts with shared prefixes and query offsets", by_length)
    added = compare("succ", succ, lengths, bench)
    show(console, f"succ: one input in {CHUNKS} chunks with an output of {SUCC_OUTPUT}", added)
    console.print(NOTE)

    prefix, own, output, total = (192, 64, 256, 2048) if options.quick else (768, 256, 512, 8192)
    layouts = {(n, how): how == "shared" for how in ("shared", "separate") for n in (1, 2, 4, 8, 16)}
    batches = {key: contexts(key[0], prefix, own, output, shared) for key, shared in layouts.items()}
    by_contexts = grow(batches, bench)
    show(
        console, f"MISO on n contexts of {prefix} common and {own} own tokens, with an output of {output}", by_contexts
    )
    by_chunks = grow({(k, ""): succ(total, k, total // 16) for k in (1, 2, 4, 8)}, bench)
    show(console, f"MISO on n chunks of one input, {total} tokens with an output of {total // 16}", by_chunks)
    if options.json:
        figures = {"lengths": by_length + added, "contexts": by_contexts, "chunks": by_chunks}
        options.json.write_text(json.dumps({"setting": setting} | figures, indent=1) + "\n")
    if options.plot:
        draw(options.plot, by_length + added, by_contexts, by_chunks)


if __name__ == "__main__":
    main()
