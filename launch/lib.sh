# shellcheck shell=bash
# Shared by launch/*.sbatch: how a stage runs inside a SLURM job. Sourced, never run.
#
# Set in the environment of sbatch (`sbatch` passes it on):
#   CONTAINER_IMAGE   image for pyxis/enroot (a .sqsh file or an image name), or "none": bare metal
#   CONTAINER_MOUNTS  one comma-separated list, /host:/container,...; the submit folder is added
#   CONTAINER_ENV     one comma-separated list of more variables that win over those of the image
#   MINITRON          the command to run; default "minitron" (bare metal: /path/.venv/bin/minitron)
#   SRUN_ARGS         more arguments of srun, split at spaces ("--mpi=pmix")
#   MINITRON_LOST_NODE_SECONDS  how long SLURM may take to find a node dead; default 600 (SlurmdTimeout is 300)
#   MINITRON_MAX_IDLE_STARTS  starts in a row that may be stopped before they saved anything; default 5
# Arguments of a script are those of the stage, output_dir= among them; --dry-run prints the srun
# command and stops.

set -euo pipefail

# NCCL, UCX and CUDA settings of every stage, each kept if the environment has it already; what a
# fabric needs of its own (NCCL_SOCKET_IFNAME, NCCL_IB_HCA, UCX_NET_DEVICES, ...) is set there too.
# Megatron orders compute and communication by issue order, which needs a single hardware queue.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# UCX would cache what kind of memory an address is, and misses what PyTorch's allocator frees.
export UCX_MEMTYPE_CACHE="${UCX_MEMTYPE_CACHE:-n}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"

# srun does not take this over from sbatch by itself (SLURM 22.05 and later).
export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}}"

# Exit codes of a stage that was told to stop: the same command goes on, or starts over.
readonly PREEMPTED=75 TERMINATED=143 BAD_INPUT=2

say() { printf '%s\n' "$*" >&2; }

# Names of variables that win over those of an image, which pyxis would let win; comma-separated.
own_variables() {
  local name names=''
  while read -r name; do
    case $name in
      NCCL_* | TORCH_NCCL_* | UCX_* | CUDA_DEVICE_* | OMP_NUM_THREADS) names+="$name," ;;
    esac
  done < <(compgen -e)
  names+=${CONTAINER_ENV:-}
  printf '%s' "${names%,}"
}

# Whether one process does all the work of a stage: prune runs the model only on samples.
needs_one_task() {
  case $1 in
    import | data | export | pipeline) return 0 ;;
    prune) [[ ${*:2} != *data.* && ${*:2} != *experiment=* && ${*:2} != *--config* ]] ;;
    *) return 1 ;;
  esac
}

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
  # Other tasks would have nothing to do, and a minute after they end the one at work were killed.
  if needs_one_task "$stage" "$@"; then command+=(--nodes=1 --ntasks=1); fi
  if [[ $CONTAINER_IMAGE != none ]]; then
    local mounts="${CONTAINER_MOUNTS:+$CONTAINER_MOUNTS,}$PWD:$PWD"
    command+=(--container-image="$CONTAINER_IMAGE" --container-mounts="$mounts")
    command+=(--container-workdir="$PWD" --no-container-mount-home)
    command+=(--container-env="$(own_variables)")
  fi
  local -a extra
  read -ra extra <<<"${SRUN_ARGS:-}"
  command+=("${extra[@]}" "${MINITRON:-minitron}" "$stage" "$@")
}

# Value of the last KEY=value among the arguments; nothing without one.
value_of() {
  local key=$1 argument value=''
  shift
  for argument in "$@"; do
    if [[ $argument == "$key="* ]]; then value=${argument#"$key="}; fi
  done
  value=${value#[\'\"]}
  printf '%s' "${value%[\'\"]}"
}

# What stands in a result folder and its unfinished work, logs left out: equal when nothing was saved.
saved_work() {
  local end
  for end in '' .partial; do
    (cd -- "$1$end" &>/dev/null && find . -type f ! -name '*.log' ! -name 'partial.json*' ! -name 'owner.json*' \
      ! -path '*/logs/*' -printf "$end %p %s\n" 2>/dev/null | sort) || true
  done | cksum
}

# This job, for SLURM's commands: the id of one task of an array is also that of the whole array.
this_job() {
  local own=${SLURM_JOB_ID:?not inside a SLURM job}
  printf '%s' "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$own}"
}

# Seconds until the job's time limit; nothing where there is none.
seconds_left() {
  local end
  end=$(date -d "$(squeue -h -j "$(this_job)" -o %e)" +%s 2>/dev/null) || return 0
  printf '%d' "$((end - $(date +%s)))"
}

# State of this job, UNKNOWN where SLURM does not answer for a minute. SIGNALING, which SLURM shows
# until every node has the signal, hides what it is besides; a stage that saves fast ends sooner.
job_state() {
  local state tries=60
  while
    state=$(squeue -h -j "$(this_job)" -o %T) || state=UNKNOWN
    [[ $state == @(SIGNALING|UNKNOWN) ]] && ((tries--))
  do
    sleep 1
  done
  printf '%s' "$state"
}

# Whether a node of this job does not answer any more. The ranks of the others saw connections close,
# and SLURM itself looks after such a node only now and then (SlurmdTimeout).
lost_a_node() {
  local nodes=${SLURM_JOB_NUM_NODES:-1}
  ((nodes > 1)) && ! timeout 120 srun --overlap --nodes="$nodes" --ntasks="$nodes" \
    --ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=1 true &>/dev/null
}

# Wait until SLURM itself gives up a node that does not answer, and puts the job back into the queue.
# A job that is requeued before would not start sooner, and SLURM 22.05 then starts it without its
# GPUs. Where the node answers again the job goes on waiting in vain, so there is a limit.
await_slurm() {
  local stage=$1 seconds=${MINITRON_LOST_NODE_SECONDS:-600}
  local end=$((SECONDS + seconds))
  say "minitron $stage lost a node: waiting up to $seconds seconds for SLURM to requeue job $(this_job)"
  while ((SECONDS < end)) && [[ $(job_state) == @(RUNNING|SIGNALING|UNKNOWN) ]]; do
    sleep 5 || true # SLURM's signal ends it
  done
}

# requeue STAGE OUTPUT_DIR BEFORE WHY: start the job again, unless that cannot lead anywhere. BEFORE
# is what `saved_work` said at the start. Returns 1 when the job has to end, with a message.
requeue() {
  local stage=$1 output=$2 before=$3 why=$4 count="$2.idle_starts" idle=0 left state
  state=$(job_state)
  if [[ $state == UNKNOWN ]]; then
    # A job that was cancelled must not come back.
    say "minitron $stage $why, and SLURM does not answer: job $(this_job) is not requeued; submit it again, it goes on"
    return 0
  fi
  if [[ $state != @(RUNNING|SIGNALING) ]]; then
    return 0 # it was cancelled, or SLURM itself puts it back into the queue
  fi
  if [[ $(saved_work "$output") == "$before" ]]; then
    left=$(seconds_left)
    if ((${left:-9999} <= 180)); then
      say "minitron $stage: the time limit came before anything new was saved, and would again: give the job more time (--time), then submit it again"
      return 1
    fi
    if ((${SLURM_RESTART_COUNT:-0} > 0)) && [[ -f $count ]]; then idle=$(<"$count"); fi
    if ((++idle >= ${MINITRON_MAX_IDLE_STARTS:-5})); then
      rm -f "$count"
      say "minitron $stage: stopped $idle times in a row before anything new was saved: save more often, or submit it where it is not pre-empted so soon (MINITRON_MAX_IDLE_STARTS=$idle is the limit)"
      return 1
    fi
    mkdir -p "$(dirname "$count")"
    printf '%d\n' "$idle" >"$count"
  else
    rm -f "$count"
  fi
  say "minitron $stage $why: requeueing job $(this_job)"
  scontrol requeue "$(this_job)" || say "job $(this_job) cannot be requeued: submit it again, it goes on"
}

# Say once more why the stage failed, in the last line of the log: srun has had its say in between.
say_why() {
  local stage=$1 code=$2 output=$3 why=''
  why=$(sed -n 's/^{"code": [0-9]*, "message": "\(.*\)"}$/\1/p' "$MINITRON_VERDICT_FILE" 2>/dev/null) || true
  why=${why:-"ended from outside, without a word (out of memory, perhaps): see $output.log"}
  why=${why//\\\"/\"} # JSON's escapes; %b does the others
  say "minitron $stage: $(printf '%b' "$why") [exit code $code]"
}

# run_stage STAGE [--dry-run] output_dir=... [key=value ...]
run_stage() {
  local stage=$1 dry_run='' argument code=0 output before
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
  output=$(value_of output_dir "${arguments[@]}")
  if [[ -z $output ]]; then
    say "minitron $stage: output_dir is not among the arguments; add output_dir=..., where the job sees whether a requeued stage gets on"
    exit 2
  fi
  if [[ $output == *\$\{* ]]; then
    say "minitron $stage: output_dir=$output is read by this script, too, which does not fill in \${...}; write the whole path"
    exit 2
  fi
  output=${output/#\~\//$HOME/}
  before=$(saved_work "$output")
  export MINITRON_VERDICT_FILE="$PWD/.minitron_${SLURM_JOB_ID:-$$}.json"
  rm -f "$MINITRON_VERDICT_FILE"
  say "job ${SLURM_JOB_ID:-?} on ${SLURM_JOB_NODELIST:-?}, start ${SLURM_RESTART_COUNT:-0}:$(printf ' %q' "${command[@]}")"
  trap : TERM # SLURM signals the tasks; this shell stays to read their exit code
  "${command[@]}" || code=$?
  if ((code == PREEMPTED || code == TERMINATED)); then
    requeue "$stage" "$output" "$before" "was told to stop" || code=1
  elif ((code && code != BAD_INPUT)) && lost_a_node; then
    await_slurm "$stage"
    requeue "$stage" "$output" "$before" "lost a node" || code=1
  else
    rm -f "$output.idle_starts"
    if ((code)); then say_why "$stage" "$code" "$output"; fi
  fi
  rm -f "$MINITRON_VERDICT_FILE"
  exit "$code"
}
