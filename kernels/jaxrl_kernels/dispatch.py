"""The one rule by which a kernel is chosen: by name where the caller gives one, else by the platform at lowering."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax.extend.backend import get_backend
from jax.extend.core import Primitive
from jax.interpreters import mlir

Version = Callable[..., Any]

# Where a version can run, by the start of its name; one that stands not here runs everywhere.
PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "cuda", "mosaic_gpu": "cuda"}
HOPPER = "9.0"  # compute capability of the GPUs that have wgmma, which no later GPU has


def choose(
    implementation: str | None,
    *,
    cpu: Version,
    tpu: Version | str | None = None,
    gpu: Version | str | None = None,
    hopper: Version | str | None = None,
    **others: Version | str,
) -> Version:
    """The function to call with a kernel's arrays.

    Without a name, the platform that the program is lowered for decides: `tpu` on a TPU, `gpu` on a CUDA device, `cpu`
    wherever those are missing. So a function that is exported on one machine for another carries the other's kernel.
    On a machine with a Hopper GPU, a program for CUDA takes `hopper` where that serves. A machine without a GPU cannot
    know which one its program will meet, so there `hopper` is taken by name only. All versions are traced, none but the
    chosen one is lowered. Differentiate around the call (`jax.custom_vjp`), not through it: a Pallas kernel has no
    derivative.

    Args:
      implementation: None, or a name: "xla" for `cpu`, "pallas_tpu" for `tpu`, "pallas_gpu" for `gpu`, "mosaic_gpu" for
        `hopper`, or one of `others`.
      cpu, tpu, gpu, hopper, others: functions of the same arrays with results of the same shapes. A string in place of
        a function says why that version cannot serve this call, such as "needs heads of 64 or 128, got 80". A name in
        `others` that begins with pallas_tpu, pallas_gpu or mosaic_gpu runs on that platform only.

    Raises:
      ValueError: an unknown name, a version that cannot serve this call or that this machine's GPU cannot run, or (on
        lowering) one of another platform.
    """
    capability = compute_capability()
    if capability not in (None, HOPPER) and callable(hopper):
        hopper = f"needs a GPU of compute capability {HOPPER} (H100, H200, GH200), this machine's has {capability}"
    given = {"xla": cpu, "pallas_tpu": tpu, "pallas_gpu": gpu, "mosaic_gpu": hopper, **others}
    versions = {name: version for name, version in given.items() if callable(version)}
    if implementation is None:
        best = versions.get("mosaic_gpu") if capability == HOPPER else None
        accelerated = {"tpu": versions.get("pallas_tpu"), "cuda": best or versions.get("pallas_gpu")}
        branches = {platform: version for platform, version in accelerated.items() if version is not None}
        return lambda *arrays: jax.lax.platform_dependent(*arrays, default=cpu, **branches)
    if implementation not in versions:
        reason = given.get(implementation)
        problem = f"{implementation!r} cannot serve this call: {reason}" if reason else f"got {implementation!r}"
        raise ValueError(f"implementation must be None or one of {_listed(versions)}; {problem}")
    version, platform = versions[implementation], _platform(implementation)
    if platform is None:
        return version
    fitting = _listed(name for name in versions if _platform(name) is None)
    message = (
        f"implementation {implementation!r} runs on {platform} only; on {{platform}} take None or one of {fitting}"
    )

    def refuse(*arrays: Any) -> Any:
        shapes = jax.eval_shape(version, *arrays)
        number = _refuse.bind(message=message)

        def typed(leaf: Any) -> Any:  # under `shard_map`, differing between devices where the version's result does
            array = jnp.broadcast_to(number, leaf.shape).astype(leaf.dtype)
            axes = tuple(leaf.manual_axis_type.varying) if leaf.manual_axis_type else ()
            return jax.lax.pcast(array, axes, to="varying") if axes else array

        return jax.tree.map(typed, shapes)

    return lambda *arrays: jax.lax.platform_dependent(*arrays, default=refuse, **{platform: version})


def compute_capability() -> str | None:
    """That of this machine's first NVIDIA GPU, such as "9.0"; None on a machine without one."""
    if jax.default_backend() != "gpu" or "cuda" not in get_backend().platform_version:
        return None
    return jax.devices()[0].compute_capability


def export_for(platform: str, function: Version, *arrays: Any) -> jax.export.Exported:
    """`jax.export` of a function for a platform that need not be there, "cpu", "tpu" or "cuda", with its kernels.

    For CUDA it names a GPU, which Triton's lowering asks for since jax 0.11, and admits the call of Triton kernels,
    whose format jax does not promise to keep: run it with the version of jax that wrote it.
    """
    checks = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    device = jax.sharding.AbstractDevice("NVIDIA H100", 132, "gpu") if platform == "cuda" else None
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return jax.export.export(jax.jit(function), platforms=[platform], disabled_checks=checks)(*arrays)


def _platform(name: str) -> str | None:
    return next((platform for start, platform in PLATFORMS.items() if name.startswith(start)), None)


def _listed(names: Any) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _raise_on_lowering(context: mlir.LoweringRuleContext, *, message: str) -> Any:
    platforms = context.platforms or context.module_context.platforms
    raise ValueError(message.format(platform=" and ".join(platforms)))


# A number that nobody can compute: it lets a function be traced anywhere, and speaks where it is lowered for a platform
# that it was not written for.
_refuse = Primitive("refuse_platform")
_refuse.def_abstract_eval(lambda *, message: jax.core.ShapedArray((), jnp.float32))
mlir.register_lowering(_refuse, _raise_on_lowering)


@_refuse.def_impl
def _raise_at_once(*, message: str) -> Any:
    raise ValueError(message.format(platform=jax.default_backend()))
