"""CDRL measured: one command trains, samples, scores and draws.

    python -m benchmarks.cdrl digits   digits, beside EDM and a Gaussian (results/demo.json)
    python -m benchmarks.cdrl toy      eight squares in the plane
    python -m benchmarks.cdrl ablation the digits with each change of their config taken back
    python -m benchmarks.cdrl densities model=RUN   OOD scores and bits per dimension of digits
    python -m benchmarks.cdrl speed    ms of a training step and of a Langevin step, ours and plain
    python -m benchmarks.cdrl fashion  a GPU: Fashion-MNIST, CDRL, DRL, EDM for the same time

Further words: out=FOLDER of the JSON (benchmarks/results), pictures=FOLDER (docs), model=RUN (score
a run that is there already), quick=true (digits: 360 samples, no error bars), and key=value of the
config. Writes OUT/cdrl_WHAT.json with command,
seed, machine, versions and seconds, and PICTURES/cdrl_*.png.
"""

import json
import sys
import time
from pathlib import Path

import torch

import genmodels
from benchmarks import record, timing
from benchmarks.cdrl_toy import toy
from benchmarks.demo import BLOCK, BLOCKS, markdown_table, score_rows
from benchmarks.record import last_words
from genmodels import checkpoint, cli, generation, images
from genmodels.commands.evaluate import evaluate
from genmodels.commands.train import train
from genmodels.config.words import check_choice, check_flags, split_words
from genmodels.data import load_split
from genmodels.evaluation.scorer import Scorer
from genmodels.networks.ebm import fixed_weights, power_iteration
from genmodels.sampling.langevin import GraphedChain
from genmodels.sampling.recovery import recovery_chain

RESULTS = Path("benchmarks/results")
PLACES = {"model": "RUN", "out": "OUT", "pictures": "OUT", "out_dir": "RUNS"}  # not shown


def digits(run, out, pictures, started, facts, quick=False):
    """Score 1,440 samples in blocks of the 360 held-out digits; draw samples and completions."""
    model = genmodels.load(run)
    began = time.monotonic()
    blocks = 1 if quick else BLOCKS
    generated = generation.generate_all(model, range(BLOCK * blocks), batch=360)
    facts["sample_seconds"] = round(time.monotonic() - began, 1)
    (real, _), (held_out, labels) = (load_split(model.cfg.data, s) for s in ("train", "test"))
    values = scorers(held_out)
    facts |= {"without error bars": {"CDRL (ours)": values(generated)}, "count": len(generated)}
    draw_digits(pictures, model, generated, held_out, labels)
    if quick:
        print(json.dumps(facts["without error bars"], indent=1))
        return write(out / "cdrl_digits.json", facts, started)
    short = max(1, model.cfg.method.steps // 3)
    for options in ({"tweedie_scale": 0.0}, {"tweedie_scale": 2.0}, {"steps": short}):
        made = generation.generate_all(model, range(BLOCK), batch=360, **options)
        facts["without error bars"][str(options)] = values(made)
    scores = score_rows({"CDRL (ours)": generated}, real, held_out)
    demo = json.loads((RESULTS / "demo.json").read_text())
    others = {f"{name} (demo.json)": row for name, row in demo["rows"].items()}
    facts |= {"rows": scores, "beside": others, "block": BLOCK}
    write(out / "cdrl_digits.json", facts, started)
    print(markdown_table(scores | others))


# What the digits' config changes in the paper's settings, each taken back by itself.
PAPERS_NET = ("network.form=dot", "network.spectral_norm=true")
PAPERS_UNITS, PAPERS_STEP = "method.units=step", "method.step_size=4e-4"
ABLATIONS = {
    "as configured": (),
    "all three, as in the paper": (*PAPERS_NET, PAPERS_UNITS, PAPERS_STEP),
    "form=dot with spectral norm": PAPERS_NET,
    "units=step": (PAPERS_UNITS,),
    "step_size=4e-4": (PAPERS_STEP,),
}


def ablation(words, out, started, facts):
    """Train the digits with each change taken back; score 1,440 samples of each in four blocks.

    rows= of them: the first ones.
    """
    rows = int(words.pop("rows", len(ABLATIONS)))
    given = [f"{key}={text}" for key, text in words.items()]
    facts["rows"] = {}
    for name, more in list(ABLATIONS.items())[:rows]:
        run = train(last_words(["configs/cdrl_digits.yaml", *more, *given]))
        model = genmodels.load(run)
        generated = generation.generate_all(model, range(BLOCK * BLOCKS), batch=360)
        scorer = scorers(load_split(model.cfg.data, "test")[0])
        facts["rows"][name] = {"words": list(more), "steps": steps_of(run), **scorer(generated)}
        write(out / "cdrl_ablation.json", facts, started)  # what is there already
        print(name, facts["rows"][name])


def densities(words, out, started, facts):
    """Tell held-out digits from other pictures; bound their bits per dimension from both sides."""
    run, num = words.pop("model"), words.pop("num", "100")
    given = [f"{key}={text}" for key, text in words.items()]
    facts |= {"seed": genmodels.load(run).cfg.seed, "steps": steps_of(run)}
    facts["ood"] = evaluated(run, out, ["ood=interpolation,noise,constant"])
    write(out / "cdrl_densities.json", facts, started)
    facts["bits_per_dim"] = evaluated(run, out, ["likelihood=ais", f"num={num}", *given])
    write(out / "cdrl_densities.json", facts, started)


def scorers(held_out):
    """Return a function of pixels: {column: value} beside the held-out digits, in blocks."""
    columns = {
        name: Scorer([metric], features, reference=held_out, equal=True, resamples=0)
        for name, metric, features in (
            ("nn1", "nn1", "pixels"),
            ("of fakes", "nn1_fake", "pixels"),
            ("of real", "nn1_real", "pixels"),
            ("FD (digits)", "fd", "digits"),
        )
    }
    return lambda pixels: {
        key: next(iter(f(pixels).values()))["value"] for key, f in columns.items()
    }


def draw_digits(pictures, model, generated, held_out, labels):
    """Write cdrl_digits.png (samples beside real), cdrl_inpaint.png and cdrl_compose.png."""
    sheets = [images.grid(part[:100], 10) for part in (generated, held_out)]
    gap = torch.full((*sheets[0].shape[:2], 3), 255, dtype=torch.uint8)
    sheet = images.enlarge(torch.cat([sheets[0], gap, sheets[1]], dim=2), 5)
    images.write_png(pictures / "cdrl_digits.png", sheet)
    known = images.from_uint8(held_out[:10])
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., :4, :] = True  # the upper half
    rows = [held_out[:10], torch.where(mask, held_out[:10], 60)]
    for k in range(3):
        x = model.sample(range(10 * k, 10 * k + 10), labels[:10], known=known, mask=mask)
        rows.append(images.to_uint8(x))
    sheet = images.grid(torch.cat(rows), 10)
    images.write_png(pictures / "cdrl_inpaint.png", images.enlarge(sheet, 6))
    rows = [model.sample(range(10), 3), model.sample(range(10), 3, guidance=2.0)]
    rows += [model.sample(range(10), compose=terms) for terms in COMPOSED]
    sheet = images.grid(images.to_uint8(torch.cat(rows)), 10)
    images.write_png(pictures / "cdrl_compose.png", images.enlarge(sheet, 6))


COMPOSED = ("3:1,8:1", "1|7", "1|7,!7:0.9")  # AND, OR, OR without one of them


# ------------------------------------------------------------------------------------------------
# Speed


def plain_chain(model, y, x_t, level, steps):
    """The chain as it is usually written: nothing frozen or kept, the tether through autograd."""
    noise_clean, (s, k) = level.noise_clean, (v.reshape(-1, 1, 1, 1) for v in (level.s, level.k))
    for _ in range(steps):
        y = y.detach().requires_grad_(True)
        total = model.net(y, noise_clean).sum() - (k * (x_t - y) ** 2).sum()
        (grad,) = torch.autograd.grad(total, y)
        y = y + 0.5 * grad + s * torch.randn_like(y)
    return y.detach()


def our_chain(model, y, x_t, level, steps):
    """The chain of the method."""
    with fixed_weights(model.net):
        return recovery_chain(
            lambda y: model.net(y, level.noise_clean),
            y,
            x_t,
            level,
            steps=steps,
            seed=torch.arange(len(y), device=y.device),
            freeze=(model.net,),
            diagnostics=False,
        ).y


def speed(words, out, started, facts):
    """Time one training step's energy part (chain, loss, Adam) and one Langevin step."""
    config, size = words.pop("config", "configs/cdrl_fashion.yaml"), int(words.pop("size", "32"))
    seconds = float(words.pop("seconds", "60"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = genmodels.build(config, *[f"{k}={v}" for k, v in words.items()]).to(device).train()
    steps, optimizer = model.cfg.method.steps, torch.optim.Adam(model.net.parameters(), 1e-8)
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(size, *model.shape, generator=generator).to(device)
    level = model.schedule.at(torch.randint(1, 7, (size,), generator=generator).to(device))

    def training_step(chain):
        y = chain(model, data, data, level, steps)
        f = [model.net(part, level.noise_clean).mean() for part in (data, y)]
        optimizer.zero_grad()
        (f[1] - f[0]).backward()
        optimizer.step()
        power_iteration(model.net)

    def half(function):
        def run():
            with torch.autocast(device, torch.bfloat16):
                function()

        return run

    variants = {}
    for name, chain in (("plain", plain_chain), ("ours", our_chain)):
        variants[f"{name}: training step"] = lambda chain=chain: training_step(chain)
        variants[f"{name}: chain"] = lambda chain=chain: chain(model, data, data, level, steps)
    facts["fp32"] = timing.measure(variants, device, seconds)
    if device == "cuda":
        model.net.to(memory_format=torch.channels_last)
        with fixed_weights(model.net), torch.autocast(device, torch.bfloat16):
            graph = GraphedChain(
                lambda y: -model.net(y, level.noise_clean),
                data,
                steps=steps,
                step=0.5,
                seed=torch.arange(size),
                noise_scale=level.s,
                tether=data,
                tether_scale=level.k,
                freeze=(model.net,),
                diagnostics=False,
            )
            variants = {name: half(function) for name, function in variants.items()}
            variants["graph: chain"] = lambda: graph(data)
            facts["bf16 channels-last"] = timing.measure(variants, device, seconds)
    facts |= {
        "config": config,
        "size": size,
        "steps": steps,
        "machine": timing.machine(device),
        "peak": timing.roofline(device),
    }
    for times in (facts["fp32"], facts.get("bf16 channels-last", {})):
        for name, row in times.items():
            row.pop("samples", None)
            per = row["median"] / (steps if "chain" in name else 1)
            print(f"{name:22} {per:9.2f} ms{' for each Langevin step' * ('chain' in name)}")
    write(out / "cdrl_speed.json", facts, started)


# ------------------------------------------------------------------------------------------------


DRL = (
    "method.initializer=none",
    "method.angles=drl",
    "method.steps=30",
    "method.step_size=2e-4",
    "method.shared_noise=false",
    "method.noise_scale=0.99",
    "method.tweedie_scale=0",
    "method.level_code=index",
    "network.kind=drl_released",
)
NO_LIMIT = "trainer.max_steps=1000000"  # time alone ends a training
RUNS = {
    "cdrl": ("configs/cdrl_fashion.yaml", ()),
    "drl": ("configs/cdrl_fashion.yaml", DRL),
    "edm": ("configs/edm_fashion.yaml", ("data.labels=false",)),  # as the other two
}


def fashion(words, out, pictures, started, facts):
    """Train CDRL, DRL and EDM for the same time; score all; tell Fashion-MNIST from other sets.

    time= of each training; overlay= a further config for all three (a smoke run: debug.yaml, which
    ends a training by its steps); num= images to score; ood= sets, ood_num= images of each;
    key=value for all three, network. and method. for CDRL and DRL.
    """
    num, limit = words.pop("num", "10000"), words.pop("time", "6m")
    sets = words.pop("ood", "mnist,interpolation,noise,constant")
    ood_num = words.pop("ood_num", "2000")
    overlay = [words.pop("overlay")] if "overlay" in words else []
    own = ("network.", "method.")
    for name, (config, more) in RUNS.items():
        given = [
            f"{key}={text}"
            for key, text in words.items()
            if name != "edm" or not key.startswith(own)
        ]
        began = time.monotonic()
        argv = [config, *overlay, f"name={name}_fashion", f"trainer.max_time={limit}"]
        run = train(last_words([*argv, *([] if overlay else [NO_LIMIT]), *more, *given]))
        row = {"train_seconds": round(time.monotonic() - began, 1), "command_words": list(more)}
        row["steps"] = steps_of(run)
        row |= evaluated(
            run,
            out,
            [
                "metrics=fd,nn1",
                "features=fashion",
                "equal=true",
                f"num={num}",
                "data=fashion_mnist:test",
                "batch=500",
                f"save_images={out}/{name}.npz",
            ],
        )
        if name != "edm":
            row["ood"] = evaluated(run, out, [f"ood={sets}", f"num={ood_num}", "pad=2"])
        facts[name] = row
        write(out / "cdrl_fashion.json", facts, started)  # what is there already
    shown = images.read_images(out / "cdrl.npz")[:100]
    images.write_png(pictures / "cdrl_fashion.png", images.grid(shown, 10))


def evaluated(run, out, words):
    """Return the metrics of `evaluate.py RUN words`."""
    path = out / "evaluated.json"
    evaluate(last_words([str(run), *words, f"out={path}"]))
    metrics = json.loads(path.read_text())["metrics"]
    path.unlink()
    return metrics


def steps_of(run):
    """Return the optimizer steps of a run's last checkpoint."""
    return checkpoint.read_checkpoint(run)["global_step"]


def write(path, facts, started):
    """Write the JSON."""
    record.write(path, **facts | {"seconds": round(time.monotonic() - started, 1)})
    print(f"written: {path}")


def run_benchmark(argv):
    """Run one benchmark; see the module's docstring."""
    positionals, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    what = positionals[0] if len(positionals) == 1 else " ".join(positionals)
    if flags:
        print(__doc__.strip())
        return
    check_choice("benchmark", what, ("digits", "toy", "ablation", "densities", "speed", "fashion"))
    out, pictures = (
        Path(words.pop(key, default)) for key, default in (("out", RESULTS), ("pictures", "docs"))
    )
    for folder in (out, pictures):
        folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cpu, started = time.process_time(), time.monotonic()
    shown = [
        f"{key}={PLACES.get(key, text)}" if mark else key
        for key, mark, text in (word.partition("=") for word in argv)
    ]
    facts = {"command": record.command_line("cdrl", shown), "machine": timing.machine(device)}
    others = {"speed": speed, "ablation": ablation, "fashion": fashion, "densities": densities}
    if what in others:
        more = (pictures,) if what == "fashion" else ()
        return others[what](words, out, *more, started, facts)
    run, quick = words.pop("model", None), words.pop("quick", "") == "true"
    if run is None:
        given = [f"{key}={text}" for key, text in words.items()]
        run = train(last_words([f"configs/cdrl_{what}.yaml", *given]))
        facts["train_seconds"] = round(time.monotonic() - started, 1)
        # Other work on the machine enters the seconds above, not these.
        facts["train_cpu_seconds"] = round(time.process_time() - cpu, 1)
    cfg = genmodels.load(run).cfg
    facts |= {"seed": cfg.seed, "steps": steps_of(run), "batch": cfg.data.batch_size}
    if what == "toy":
        facts |= toy(run, pictures / "cdrl_toy.png")
        print(json.dumps(facts, indent=1))
        return write(out / "cdrl_toy.json", facts, started)
    digits(run, out, pictures, started, facts, quick)


def main(argv=None):
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(run_benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
