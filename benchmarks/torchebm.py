"""torchebm's Langevin samplers, to be timed beside ours: `pip install torchebm` for these rows.

Each function returns a function without arguments. Where torchebm is not installed that raises
ModuleNotFoundError, and the table says so.
"""

from importlib import metadata

__all__ = ["chain", "double_well", "step", "version"]


def version():
    """Return torchebm's version, or None."""
    try:
        return metadata.version("torchebm")
    except metadata.PackageNotFoundError:
        return None


def step(y, grad, size, clamp):
    """One step with a given grad log p: its integrator and clamp, or on a GPU its fused kernel."""
    energy_grad = -grad

    def run():
        if y.is_cuda:
            from torchebm.cuda.fused_langevin import fused_langevin_step

            return fused_langevin_step(y, energy_grad, size, clamp=clamp)
        from torchebm.integrators import EulerMaruyamaIntegrator

        integrator = EulerMaruyamaIntegrator()
        new = integrator.step({"x": y}, step_size=size, noise_scale=1.0, drift=lambda x, t: grad)
        return new["x"].clamp_(*clamp)

    return run


def double_well(y, energy, steps, size):
    """A chain on our DoubleWell: its sampler on its own energy, or on a GPU its whole-chain kernel.

    The kernel works in place, so it goes on from where it was.
    """
    state = y.clone()

    def run():
        if y.is_cuda:
            from torchebm.cuda.fused_langevin import doublewell_langevin_chain

            options = {"barrier_height": energy.height, "b": energy.centre}
            return doublewell_langevin_chain(state, steps, size, **options)
        from torchebm.core import DoubleWellModel
        from torchebm.samplers import LangevinDynamics

        sampler = LangevinDynamics(DoubleWellModel(energy.height, energy.centre), step_size=size)
        return sampler.sample(x=y, n_steps=steps)

    return run


def chain(energy, y, steps, size):
    """A chain through any energy, (B, ...) -> (B,), by its sampler."""

    def run():
        from torchebm.core import BaseModel
        from torchebm.samplers import LangevinDynamics

        class Model(BaseModel):
            def forward(self, x):
                return energy(x)

        sampler = LangevinDynamics(Model(), step_size=size, device=y.device)
        return sampler.sample(x=y, n_steps=steps)

    return run
