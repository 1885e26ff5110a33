"""Tables from measurements: every number in them can be traced to a JSON file and its machine."""

__all__ = ["compare", "markdown"]

SCHEMA = 2


def _time(milliseconds):
    return f"{1e3 * milliseconds:.3g} us" if milliseconds < 1 else f"{milliseconds:.3g} ms"


def _ours(row):
    names = [name for name in row["variants"] if name.startswith("ours")]
    return names[0]


def share(row, peak):
    """Return the share of the measured roofline that ours reaches, in 0..1, or None."""
    result = row["variants"][_ours(row)]
    if "median" not in result:
        return None
    seconds = 1e-3 * result["median"]
    parts = (
        row["bytes"] / (1e9 * peak["copy_gb_s"]),
        row["flops"] / (1e12 * peak["matmul_tflop_s"]),
    )
    return max(parts) / seconds if max(parts) > 0 else None


def ratio(row, name, suffix=""):
    """Return time of `name` / time of ours, both with the suffix, or None."""
    ours, other = (row["variants"].get(n + suffix, {}) for n in (_ours(row), name))
    return other["median"] / ours["median"] if "median" in ours and "median" in other else None


def _cells(row, peak, gpu):
    """Return the cells of a case."""
    result = row["variants"][_ours(row)]
    spread = 50 * (result["high"] - result["low"]) / result["median"]
    part = share(row, peak)
    cells = [row["name"], row["size"], row["dtype"], f"{_time(result['median'])} +-{spread:.0f}%"]
    cells.append("-" if part is None else f"{100 * part:.0f} %")
    cells += [_times(ratio(row, name)) for name in ("eager", "compile", "torchebm")]
    if gpu:
        graphed = row["variants"].get(_ours(row) + " (graph)", {})
        cells.append(_time(graphed["median"]) if "median" in graphed else "-")
        cells += [_times(ratio(row, name, " (graph)")) for name in ("eager", "compile")]
        extra = [row["variants"].get(name, {}).get("extra_mb") for name in (_ours(row), "eager")]
        cells.append(" / ".join("-" if mb is None else f"{mb:.0f}" for mb in extra))
    return [*cells, f"{row['error']:.1e}"]


def _library(info):
    """Return what of the compiled library was used, and how busy the machine was, as text."""
    words = [f"C with {info['native']}"] if info.get("native") else []
    words += [f"load {info['load']}"] if "load" in info else []
    return "".join(f", {word}" for word in words)


def _times(value):
    return "-" if value is None else f"{value:.2f}x"


def markdown(record):
    """Return the table of a record (the JSON of one run) with its machine, as text."""
    info, peak, gpu = record["machine"], record["roofline"], record["device"] == "cuda"
    where = info.get("gpu") or f"{info['cpu']}, {info['threads']} thread"
    names = ["case", "size", "dtype", "ours", "of roofline"]
    names += ["eager / ours", "compile / ours", "torchebm / ours"]
    if gpu:
        names += [
            "ours, graph",
            "eager / ours, graphs",
            "compile / ours, graphs",
            "extra MB, ours / eager",
        ]
    names.append("error")
    lines = [
        f"Measured {info['date']} on {where}{_library(info)}; torch {info['torch']}, "
        f"triton {info['triton']}, torchebm {info.get('torchebm')}, "
        f"Python {info['python']}, commit {info['commit']}"
        f"{' with uncommitted changes' if info['uncommitted'] else ''}.",
        f"Command: `{record['command']}` ({record['seconds']:.0f} s). Copy "
        f"{peak['copy_gb_s']:.0f} GB/s, {peak['matmul_dtype']} matmul "
        f"{peak['matmul_tflop_s']:.3g} TFLOP/s, measured in the same run. Times are medians "
        + ("by CUDA events, L2 flushed" if gpu else "of CPU time")
        + "; +- is half the interquartile range. error: ours against float64, the largest "
        "difference over the largest magnitude.",
        "",
        "| " + " | ".join(names) + " |",
        "|" + "---|" * len(names),
    ]
    notes = []
    for row in record["rows"]:
        for name, result in row["variants"].items():
            if "error" in result:
                notes.append(f"- {row['name']} ({row['size']}), {name}: {result['error']}")
        if "median" not in row["variants"][_ours(row)]:
            continue
        lines.append("| " + " | ".join(_cells(row, peak, gpu)) + " |")
        for name, other in row["variants"].items():
            more = name.startswith("ours") and name != _ours(row) and not name.endswith("(graph)")
            if more and "median" in other and "median" in row["variants"].get("eager", {}):
                value = row["variants"]["eager"]["median"] / other["median"]
                cells = [
                    f"{row['name']}: {name}",
                    row["size"],
                    row["dtype"],
                    _time(other["median"]),
                    "-",
                    _times(value),
                ]
                cells += ["-"] * (len(names) - len(cells))
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *(["", "Did not run:", *notes] if notes else [])]) + "\n"


def compare(record, old):
    """Return lines that set ours in two records side by side."""
    before = {(r["name"], r["size"], r["dtype"]): r for r in old["rows"]}
    lines = []
    for row in record["rows"]:
        match = before.get((row["name"], row["size"], row["dtype"]))
        if match:
            new, was = (r["variants"][_ours(r)].get("median") for r in (row, match))
            if new and was:
                lines.append(
                    f"{row['name']} {row['size']} {row['dtype']}: {was / new:.2f}x as fast"
                )
    return "\n".join(lines)
