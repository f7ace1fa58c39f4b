"""Training: state and optimizer, the loop with checkpoints and its record, configs, tables and figures."""

from jaxrl_llm.train.checkpoints import CheckpointError, Checkpoints, finished_steps, read_arrays
from jaxrl_llm.train.config import (
    choose_arm,
    flatten,
    from_json,
    load_config,
    optimizer_config,
    override,
    parse_overrides,
    to_json,
)
from jaxrl_llm.train.evaluate import forgetting
from jaxrl_llm.train.figures import bar_chart, learning_curves, read_curve
from jaxrl_llm.train.host_state import HostState
from jaxrl_llm.train.interrupts import Interrupted, StopRequests
from jaxrl_llm.train.intervals import Interval, bootstrap_mean, judge
from jaxrl_llm.train.logging import RunLog, WorkdirError, read_metrics, read_outcomes, read_summary
from jaxrl_llm.train.loops import NonFiniteError, loop, over_seeds, stack_seeds
from jaxrl_llm.train.planning import Program, plan, rollout_programs
from jaxrl_llm.train.processes import fetch, is_writer, start_processes, wait_for_all
from jaxrl_llm.train.runs import Page, enable_compilation_cache, is_complete, run_page
from jaxrl_llm.train.sharding import (
    batch_shardings,
    make_mesh,
    shard_batch,
    shard_state,
    state_shardings,
    use_mesh,
)
from jaxrl_llm.train.stages import PlateauStages, Stage, StageState, run_stages
from jaxrl_llm.train.state import (
    accumulate_gradients,
    apply_gradients,
    init_optimizer,
    init_state,
    make_optimizer,
    make_policy_step,
    make_schedule,
    make_update,
    mean_metrics,
)
from jaxrl_llm.train.supervised import make_sft_step, score_packed
from jaxrl_llm.train.tables import Claim, Table, better, find_metric, run_table, summarize, write_table

__all__ = [
    "PlateauStages",
    "Stage",
    "StageState",
    "CheckpointError",
    "Checkpoints",
    "Claim",
    "HostState",
    "Interrupted",
    "Interval",
    "NonFiniteError",
    "Page",
    "Program",
    "RunLog",
    "StopRequests",
    "Table",
    "WorkdirError",
    "accumulate_gradients",
    "apply_gradients",
    "bar_chart",
    "batch_shardings",
    "better",
    "bootstrap_mean",
    "choose_arm",
    "enable_compilation_cache",
    "fetch",
    "find_metric",
    "finished_steps",
    "flatten",
    "forgetting",
    "from_json",
    "init_optimizer",
    "init_state",
    "is_complete",
    "is_writer",
    "judge",
    "learning_curves",
    "load_config",
    "loop",
    "make_mesh",
    "make_optimizer",
    "make_schedule",
    "make_update",
    "make_sft_step",
    "make_policy_step",
    "mean_metrics",
    "optimizer_config",
    "over_seeds",
    "override",
    "parse_overrides",
    "plan",
    "read_arrays",
    "read_curve",
    "read_metrics",
    "read_outcomes",
    "read_summary",
    "rollout_programs",
    "run_page",
    "run_stages",
    "run_table",
    "score_packed",
    "shard_batch",
    "shard_state",
    "stack_seeds",
    "start_processes",
    "state_shardings",
    "summarize",
    "to_json",
    "use_mesh",
    "wait_for_all",
    "write_table",
]
