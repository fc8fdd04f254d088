# shellcheck shell=bash
# Shared by launch/*.sbatch: how a stage runs inside a SLURM job. Sourced, never run.
#
# Set in the environment of sbatch (`sbatch` passes it on):
#   CONTAINER_IMAGE   image for pyxis/enroot (a .sqsh file or an image name), or "none": bare metal
#   CONTAINER_MOUNTS  one comma-separated list, /host:/container,...; the submit folder is added
#   MINITRON          the command to run; default "minitron" (bare metal: /path/.venv/bin/minitron)
#   SRUN_ARGS         more arguments of srun, split at spaces ("--mpi=pmix")
# Arguments of a script are those of the stage; --dry-run prints the srun command and stops.

set -euo pipefail

# NCCL and CUDA settings of every stage, each kept if the environment has it already.
# Megatron orders compute and communication by issue order, which needs a single hardware queue.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"

# srun does not take this over from sbatch by itself (SLURM 22.05 and later).
export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}}"

readonly PREEMPTED=75 # exit code of a stage that was told to stop and saved its work

say() { printf '%s\n' "$*" >&2; }

# Fill the array `command` with the srun command of one stage.
build_command() {
  local stage=$1
  shift
  if [[ -z ${CONTAINER_IMAGE:-} ]]; then
    say "CONTAINER_IMAGE is not set; export CONTAINER_IMAGE=<image>, or CONTAINER_IMAGE=none to run without a container"
    exit 2
  fi
  # Tasks that outlive the first one by a minute are killed: ranks of a failed job would wait for it
  # forever, ranks of a pre-empted one end by themselves within seconds (and with their own code,
  # which --kill-on-bad-exit would take from them).
  command=(srun --kill-on-bad-exit=0 --wait=60)
  if [[ $CONTAINER_IMAGE != none ]]; then
    local mounts="${CONTAINER_MOUNTS:+$CONTAINER_MOUNTS,}$PWD:$PWD"
    command+=(--container-image="$CONTAINER_IMAGE" --container-mounts="$mounts")
    command+=(--container-workdir="$PWD" --no-container-mount-home)
  fi
  local -a extra
  read -ra extra <<<"${SRUN_ARGS:-}"
  command+=("${extra[@]}" "${MINITRON:-minitron}" "$stage" "$@")
}

# run_stage STAGE [--dry-run] [key=value ...]
run_stage() {
  local stage=$1 dry_run='' argument code=0
  local -a command arguments=()
  shift
  for argument in "$@"; do
    if [[ $argument == --dry-run ]]; then dry_run=yes; else arguments+=("$argument"); fi
  done
  build_command "$stage" "${arguments[@]}"
  if [[ -n $dry_run ]]; then
    printf '%s' "${command[0]}"
    printf ' %q' "${command[@]:1}"
    printf '\n'
    return
  fi
  say "job ${SLURM_JOB_ID:-?} on ${SLURM_JOB_NODELIST:-?}, start ${SLURM_RESTART_COUNT:-0}:$(printf ' %q' "${command[@]}")"
  trap : TERM # SLURM signals the tasks; this shell stays to read their exit code
  "${command[@]}" || code=$?
  if ((code == PREEMPTED)); then
    say "minitron $stage saved its work: requeueing job ${SLURM_JOB_ID:?not inside a SLURM job}"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
}
