"""Tables from measurements: every number in them can be traced to a JSON file and its machine."""

__all__ = ["markdown", "compare"]

SCHEMA = 1


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


def ratio(row, name):
    """Return time of `name` / time of ours, or None."""
    ours, other = row["variants"][_ours(row)], row["variants"].get(name, {})
    return other["median"] / ours["median"] if "median" in ours and "median" in other else None


def markdown(record):
    """Return the table of a record (the JSON of one run) with its machine, as text."""
    info, peak = record["machine"], record["roofline"]
    where = info.get("gpu") or f"{info['cpu']}, {info['threads']} thread"
    lines = [
        f"Measured {info['date']} on {where}; torch {info['torch']}, triton {info['triton']}, "
        f"Python {info['python']}, commit {info['commit']}"
        f"{' with uncommitted changes' if info['uncommitted'] else ''}.",
        f"Command: `{record['command']}` ({record['seconds']:.0f} s). Copy "
        f"{peak['copy_gb_s']:.0f} GB/s, {peak['matmul_dtype']} matmul "
        f"{peak['matmul_tflop_s']:.3g} TFLOP/s, measured in the same run. Times are medians "
        + ("by CUDA events, L2 flushed" if record["device"] == "cuda" else "of CPU time")
        + "; +- is half the interquartile range.",
        "",
        "| case | size | dtype | ours | of roofline | eager / ours | compile / ours | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for row in record["rows"]:
        for name, result in row["variants"].items():
            if "error" in result:
                notes.append(f"- {row['name']} ({row['size']}), {name}: {result['error']}")
        result = row["variants"][_ours(row)]
        if "median" not in result:
            continue
        spread = 50 * (result["high"] - result["low"]) / result["median"]
        part = share(row, peak)
        cells = [
            row["name"],
            row["size"],
            row["dtype"],
            f"{_time(result['median'])} +-{spread:.0f}%",
        ]
        cells.append("-" if part is None else f"{100 * part:.0f} %")
        for name in ("eager", "compile"):
            value = ratio(row, name)
            cells.append("-" if value is None else f"{value:.2f}x")
        cells.append(f"{row['error']:.1e}")
        lines.append("| " + " | ".join(cells) + " |")
        for name, other in row["variants"].items():
            if name.startswith("ours") and name != _ours(row) and "median" in other:
                value = row["variants"]["eager"]["median"] / other["median"]
                cells = [
                    f"{row['name']}: {name}",
                    row["size"],
                    row["dtype"],
                    _time(other["median"]),
                ]
                lines.append("| " + " | ".join([*cells, "-", f"{value:.2f}x", "-", "-"]) + " |")
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
