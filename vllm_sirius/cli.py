"""The command ``vllm-sirius``."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from vllm_sirius.config import SiriusConfig
from vllm_sirius.environment import doctor as environment
from vllm_sirius.errors import ModelError, SiriusConfigError, SiriusError
from vllm_sirius.measuring.model_name import check_model_name
from vllm_sirius.metrics import predicted_speedup
from vllm_sirius.offload.errors import OffloadError
from vllm_sirius.tuning import options as tuning_options
from vllm_sirius.tuning.errors import TuningError, TuningInterrupted, TuningOptionError

CEILING_ACCEPTANCE = (0.8, 0.9, 0.95, 1.0)
"""Per-token acceptance rates for which `doctor` prints a ceiling."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: Command line without the program's name; the process's own by default.

    Returns:
        Exit status: 0; 1 if Sirius or vLLM cannot serve what was asked, or the environment is broken; 2 if an option is bad;
        130 after an interruption.
    """
    given = _parser().parse_args(arguments)
    try:
        status: int = given.run(given)
        return status
    except (SiriusConfigError, TuningOptionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ModelError, OffloadError, TuningError) as error:
        print(f"error: {error}", file=sys.stderr)
    except SiriusError as error:
        print(f"not supported: {error}", file=sys.stderr)
    except BrokenPipeError:
        # The reader of standard output went away; Python would complain once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
    except (TuningInterrupted, KeyboardInterrupt) as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return 130
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm-sirius", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser(
        "doctor",
        help="say whether vLLM runs here with Sirius, or whether a model can be served and what it can gain",
        epilog="Exit status: 0 all is well, 1 something is wrong, 2 a bad option.",
    )
    doctor.add_argument("model", nargs="?", help="path or hub name; without it only the environment is looked at")
    doctor.add_argument(
        "--fix", action="store_true", help="repair what can be repaired in the environment, and say what"
    )
    doctor.add_argument(
        "--speculative-config", type=_options, default={}, metavar="JSON", help="options of Sirius as JSON"
    )
    doctor.add_argument("--dtype", choices=(*tuning_options.DTYPES, "half", "float"), default="auto")
    doctor.add_argument("--trust-remote-code", action="store_true")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of text")
    doctor.set_defaults(run=_doctor)
    _add_offload(commands)
    tune = commands.add_parser("tune", help="measure drafts on this machine and write the settings that pay")
    tuning_options.add_arguments(tune)
    tune.set_defaults(run=_tune)
    return parser


def _add_offload(commands: Any) -> None:
    offload = commands.add_parser("offload", help="list or remove the files that offload='disk' has built")
    verbs = offload.add_subparsers(dest="verb", required=True)
    listing = verbs.add_parser("ls", help="list the files")
    removing = verbs.add_parser("rm", help="remove files")
    removing.add_argument("names", nargs="+", metavar="NAME", help="file, or `all` for those that no engine uses")
    for verb in (listing, removing):
        verb.add_argument("--offload-path", help="folder, as in the option offload_path; by default that of the cache")
        verb.add_argument("--json", action="store_true", help="print JSON instead of text")
        verb.set_defaults(run=_offload)


def _offload(given: argparse.Namespace) -> int:
    from vllm_sirius.offload.folder import offload_folder
    from vllm_sirius.offload.listing import list_files, remove

    folder = offload_folder(given.offload_path)
    files = list_files(folder) if given.verb == "ls" else remove(folder, given.names)
    if given.json:
        print(json.dumps([file.as_json() for file in files], indent=2))
        return 0
    for file in files:
        state = file.state if given.verb == "ls" else "removed"
        print(f"{file.num_bytes / 1e9:8.2f} GB  {state:10}  {file.path}")
    if not files:
        print(f"no files in {folder}")
    return 0


def _options(text: str) -> dict[str, Any]:
    """Reads ``--speculative-config`` as vLLM does."""
    example = """write an object, for example '{"kernel_size": 8}'"""
    try:
        options = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text[:80]} is not JSON ({error}): {example}") from error
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f"{text[:80]} is JSON but no object: {example}")
    method = options.pop("method", "sirius")
    if method != "sirius":
        raise argparse.ArgumentTypeError(f"method={json.dumps(method)} is not Sirius: leave the method out")
    return options


def acceptance_length(rate: float, kernel_size: int) -> float:
    """Mean tokens per verification pass if each draft token passes with the same rate, independently.

    Args:
        rate: Acceptance rate of one draft token, from 0 to 1.
        kernel_size: Most tokens per pass.

    Returns:
        ``1 + rate + ... + rate ** (kernel_size - 1)``.
    """
    return sum(rate**i for i in range(kernel_size))


def _draft_name(config: SiriusConfig) -> str:
    kept = "all neurons" if config.sparsity == "none" else f"{config.sparsity}, density {config.density:g}"
    return kept if config.draft_bits is None else f"{kept}, {config.draft_weights} {config.draft_weights_scope}"


def _rule_name(config: SiriusConfig) -> str:
    if config.lossless:
        return "lossless: the output is the model's own"
    return f"threshold {config.threshold:g}: lossy, see docs/acceptance.md"


def _doctor(given: argparse.Namespace) -> int:
    say = functools.partial(print, file=sys.stderr, flush=True)
    if given.model is None:
        findings = environment.diagnose(given.fix, say)
        if given.json:
            print(
                json.dumps(
                    {"sound": environment.is_sound(findings), "findings": [f.as_json() for f in findings]}, indent=2
                )
            )
        else:
            print(environment.format_findings(findings))
        return 0 if environment.is_sound(findings) else 1
    if given.fix and not environment.repair(say):
        return 1
    return _doctor_of_model(given)


def _doctor_of_model(given: argparse.Namespace) -> int:
    config = SiriusConfig.from_options(given.speculative_config)
    check_model_name(given.model)
    environment.require_vllm()
    # Standard output belongs to the report; vLLM reads these when it is imported.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm_sirius.integration.inspection import inspect_model

    engine = {"dtype": given.dtype, "trust_remote_code": given.trust_remote_code}
    inspected = inspect_model(given.model, given.speculative_config, engine)
    plan = inspected.draft
    config, draft = plan.config, plan.draft_density
    offload = _offload_report(given.model, config, inspected.memory)
    length = config.kernel_size
    ceilings = {
        rate: predicted_speedup(acceptance_length(rate, length), length - 1, draft, 1.0) for rate in CEILING_ACCEPTANCE
    }
    if given.json:
        report = {
            "model": given.model,
            "supported": True,
            "gated_ffns": len(plan.ffns),
            "neurons": plan.num_neurons,
            "step_bytes": plan.step_bytes,
            "ffn_share": plan.ffn_share,
            "draft_density": draft,
            "copied_bytes": plan.copied_bytes,
            "kernels": plan.kernels.reason if plan.kernels.native else f"none: {plan.kernels.reason}",
            "kernel_size": length,
            "acceptance": config.acceptance,
            "preset": config.preset,
            "ceiling_by_acceptance_rate": ceilings,
        }
        if offload is not None:
            report["offload"] = offload.as_json()
        print(json.dumps(report, indent=2))
        return 0
    print(f"{given.model}: supported")
    print(f"  gated FFNs                 {len(plan.ffns)} of {plan.num_neurons} neurons")
    print(f"  weights read per step      {plan.step_bytes / 1e9:.2f} GB, {plan.ffn_share:.1%} of them FFN")
    how = _draft_name(config) if plan.kernels.native else f"masked: {plan.kernels.reason}"
    print(f"  a draft step reads         {draft:.1%} of that ({how})")
    print(f"  extra memory for copies    {plan.copied_bytes / 2**20:.1f} MiB")
    print(f"  what of a draft is kept    {_rule_name(config)}")
    if offload is not None:
        print(offload.text())
        return 0
    print(
        f"  ceiling of the speed-up at kernel size {length}, if a verification pass cost no more than one dense step:"
    )
    for rate, ceiling in ceilings.items():
        print(
            f"    {rate:.0%} of draft tokens accepted (acceptance length {acceptance_length(rate, length):5.2f})"
            f"   {ceiling:.2f}x"
        )
    return 0


def _offload_report(model: str, config: SiriusConfig, memory: Any) -> Any:
    """What streaming comes to; ``None`` where nothing may be on a disk."""
    if memory is None:
        return None
    from vllm_sirius.offload.report import describe_offload

    return describe_offload(model, config, memory)


def _tune(given: argparse.Namespace) -> int:
    options = tuning_options.from_arguments(given)
    check_model_name(options.model)
    environment.require_vllm()
    # Loads tokenizers, which take seconds: bad options come first.
    from vllm_sirius.tuning.run import tune

    print(tune(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
