"""`python -m jaxrl_kernels.bench` at its smallest shapes: everything runs, agrees with ours and is told."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxrl_kernels.bench import __main__ as bench
from jaxrl_kernels.bench import timing

ALTERNATIVES = {
    "fused_logprob": ["naive XLA", "jax.checkpoint", "PyTorch", "Liger"],
    "flash_attention": ["dot_product_attention, xla", "dot_product_attention, cudnn", "ops.tpu.splash", "ops.gpu.att"],
    "decode_attention": ["gather, softmax", "dot_product_attention, xla", "ops.tpu.ragged_paged", "ops.gpu.paged"],
    "discounted_scan": ["jax.lax.scan", "jax.lax.associative_scan", "copy"],
    "fused_policy_loss": ["plain XLA", "copy"],
    "sample_tokens": ["jax.random.categorical", "copy"],
}

OURS = ["xla", "pallas_tpu", "pallas_gpu", "mosaic_gpu"]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """Exit code, printed text and JSON of one run over all kernels, where PyTorch is not installed."""
    path = tmp_path_factory.mktemp("bench") / "figures.json"
    with pytest.MonkeyPatch.context() as patch, pytest.MonkeyPatch.context() as output:
        patch.setitem(sys.modules, "torch", None)
        lines = []
        output.setattr("builtins.print", lambda *parts, **_: lines.append(" ".join(map(str, parts))))
        code = bench.main(["--small", "--torch", "--repeats", "2", "--json", str(path)])
    return code, "\n".join(lines), json.loads(path.read_text())


def test_every_kernel_runs_and_every_alternative_is_named(small_run):
    code, text, report = small_run
    assert code == 0, text
    assert {table["kernel"] for table in report["tables"]} == set(ALTERNATIVES)
    for table in report["tables"]:
        names = [row["implementation"] for row in table["rows"]] + list(table["not_run"])
        for part in [*ALTERNATIVES[table["kernel"]], *(f"jaxrl_kernels: {name}" for name in OURS)]:
            assert any(part in name for name in names), f"{part} is not among {names}"
        assert all(name in text for name in names)
        assert not [reason for reason in table["not_run"].values() if reason.startswith("failed")], table["not_run"]
    assert "PyTorch is not installed" in text and "runs on a TPU" in text


def test_figures_are_whole_and_alternatives_agree(small_run):
    _, _, report = small_run
    assert report["platform"] == "cpu" and set(report["ceilings"]) > {"copy_bytes_per_second"}
    for row in [row for table in report["tables"] for row in table["rows"]]:
        assert row["bytes_per_second"] > 0 and row["seconds"] > 0
        assert row["passes"] == timing.BACKWARD or row["temporary_bytes"] >= 0
        # float32 roundings of sums of some hundred terms; the loss is a small difference of such sums
        assert (row["difference"] or 0) < 1e-4, row


def test_a_failing_alternative_is_told_and_the_others_run():
    arrays = (jnp.ones(4),)
    listed = [
        timing.alternative("good", jnp.negative, arrays, jnp.ones(4), differentiated=1),
        timing.alternative("broken", lambda x: jnp.zeros(3) + x, arrays),
        timing.alternative("other", lambda x: x[:2], arrays),
    ]
    work = timing.least_work((4, 8), arrays, arrays, arrays)
    case = timing.Case("kernel", "[4]", work, listed, {"absent": "runs on a GPU"})
    ceilings = {"matmul_flops_per_second": 1e9, "copy_bytes_per_second": 1e9}
    rows, problems = timing.measure(case, ceilings, repeats=1, budget=1)
    assert [(row.implementation, row.passes) for row in rows] == [("good", "forward"), ("good", "forward + backward")]
    assert problems["absent"] == "runs on a GPU" and "failed: TypeError" in problems["broken, forward"]
    assert "the result is (2,), ours (4,)" in problems["other, forward"]
    assert work["forward"].bytes == 32 and work["forward + backward"].bytes == 80


def test_a_difference_of_times_that_is_not_positive_is_no_figure(monkeypatch):
    arrays = (jnp.ones(4),)
    listed = [timing.alternative("ours", jnp.negative, arrays, jnp.ones(4), differentiated=1)]
    work = timing.least_work((4, 8), arrays, arrays, arrays)
    work[timing.BACKWARD] = timing.Work(4, 48)
    ceilings = {"matmul_flops_per_second": 1e9, "copy_bytes_per_second": 1e9}
    for both, last in ((3.0, 1.0), (2.0, 2.0), (1.0, 1.0)):
        monkeypatch.setattr(timing, "_take_turns", lambda *_, both=both: [[2.0], [both]])
        rows, problems = timing.measure(timing.Case("kernel", "[4]", work, listed, {}), ceilings, repeats=1, budget=1)
        assert len(rows) + len(problems) == 3 and bool(problems) == (both <= 2) and rows[-1].seconds == last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flash"], "there is no kernel flash; take some of fused_logprob, flash_attention"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
    ],
)
def test_says_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert message in capsys.readouterr().err


def test_lowers_for_gpus_where_libtpu_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    assert bench.main(["discounted_scan", "--compile", "v5e:2x2"]) == 1
    text = capsys.readouterr().out
    assert "libtpu is not installed" in text and "3 Triton calls" in text
