"""Checks under Triton's interpreter of where elements lie: 64-bit indices, memory layouts."""

import torch

from genmodels.kernels import gbm_step as gbm
from genmodels.kernels import groups as groups_of
from genmodels.kernels import langevin_step as langevin
from genmodels.kernels import mala
from genmodels.kernels.dispatch import tl, triton
from tests.helpers.interpreter_steps import close, draw


@triton.jit
def locate_kernel(
    out,
    items,
    numel,
    groups,
    tiles,
    GROUPS: tl.constexpr,
    ROW: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The place of each lane, by program: item, group, element, offset, mask."""
    item, group, element, offset, mask = groups_of.locate(
        items, numel, groups, tiles, GROUPS, ROW, PACKED, WIDE
    )
    lane = tl.arange(0, 4 * GROUPS)
    zero = tl.zeros((4 * GROUPS,), dtype=tl.int64)
    item = zero + item if ROW else groups_of.spread(item, GROUPS).to(tl.int64)
    tl.store(out + lane, item)
    tl.store(out + 4 * GROUPS + lane, groups_of.spread(group, GROUPS).to(tl.int64))
    tl.store(out + 8 * GROUPS + lane, element.to(tl.int64))
    tl.store(out + 12 * GROUPS + lane, offset)
    tl.store(out + 16 * GROUPS + lane, mask.to(tl.int64))


def check_wide_indices():
    """Programs past 2^31 elements, without the memory: only the index arithmetic runs."""
    from triton.runtime.interpreter import interpreter_builder as builder

    set_index = builder.set_grid_idx
    for items, numel in ((2**20, 3 * 64**2), (2**31 - 5, 7), (5, 2**30), (2**22, 1027)):
        (programs,), layout = groups_of.launch_grid(items, numel, 256)
        assert layout["WIDE"] and items * numel > 2**31
        layout = {k: v for k, v in layout.items() if k not in ("num_warps", "enable_fp_fusion")}
        for program in (programs - 1, programs // 2, 2**31 // 1024 + 1, 3):
            out = torch.empty(5, 1024, dtype=torch.int64)
            # As if the grid had reached it: the interpreter keeps the place in grid_idx.
            builder.set_grid_idx = lambda *_, p=program: setattr(builder, "grid_idx", (p, 0, 0))
            try:
                locate_kernel[(1,)](out, **layout)
            finally:
                builder.set_grid_idx = set_index
            lane = torch.arange(1024)
            if layout["ROW"]:
                item = torch.full((1024,), program // layout["tiles"])
                element = program % layout["tiles"] * 1024 + lane
                inside = element < numel
            else:
                flat = program * 256 + lane // 4
                item = flat // layout["groups"]
                element = flat % layout["groups"] * 4 + lane % 4
                inside = (element < numel) & (item < items)
            assert torch.equal(out[4] != 0, inside)
            item = item.clamp(max=items - 1)
            got, expected = out[:4, inside], (item, element // 4, element, item * numel + element)
            for a, b in zip(got, expected):
                assert torch.equal(a, b[inside]), (items, numel, program)


def check_memory_layouts():
    """Channels last: nothing is copied where no noise is drawn, and results are those of NCHW."""
    last = {"memory_format": torch.channels_last}
    y, grad, z, x = (draw(3, 4, 5, 6) for _ in range(4))
    mask = draw(3, 1, 5, 6) > 0
    ours = [v.to(**last) for v in (y, grad, z, x)]
    options = {"step": 0.1, "tether_scale": 0.2, "clamp": (-1, 1), "mask": mask}
    a = langevin.langevin_step(y, grad, noise=z, tether=x, **options)
    b = langevin.langevin_step(*ours[:2], noise=ours[2], tether=ours[3], **options)
    assert torch.equal(a, b) and b.is_contiguous(**last)
    a = langevin.langevin_step(y, grad, seed=torch.arange(3), **options, tether=x)
    b = langevin.langevin_step(*ours[:2], seed=torch.arange(3), **options, tether=ours[3])
    assert torch.equal(a, b)  # the noise of an element is that of its logical place
    a = gbm.gbm_step(y, grad, variance=0.1, noise=z)
    b = gbm.gbm_step(*ours[:2], variance=0.1, noise=ours[2])
    assert torch.equal(a, b) and b.is_contiguous(**last)
    logs = draw(3), draw(3)
    options = {"step": 0.1, "seed": 1, "mask": mask}
    a = mala.mala_accept(y, x, grad, z, *logs, **options)
    b = mala.mala_accept(ours[0], ours[3], ours[1], ours[2], *logs, **options)
    close(a[4], b[4], atol=1e-5)
    assert torch.equal(a[0], b[0]) and b[0].is_contiguous(**last)
    mixed = mala.mala_accept(y, ours[3], grad, ours[2], *logs, **options)
    assert torch.equal(mixed[0], a[0]) and mixed[0].is_contiguous()
