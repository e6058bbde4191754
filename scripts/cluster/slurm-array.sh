#!/usr/bin/env bash
# Train a run on SLURM, without Ray: each task of an array trains a slice of the repetitions.
#
#     sbatch --array=0-7 scripts/cluster/slurm-array.sh run.toml /shared/runs/mine
#     sbatch --array=0-7 scripts/cluster/slurm-array.sh run.toml s3://bucket/runs/mine
#
# CONFIG and RUN are paths that all nodes see, or RUN is a URL. Further arguments go to `mach train`. The tasks never talk
# to each other and there is no merge step: the run is the model, complete when its last repetition is. Finished
# repetitions are skipped and begun ones go on from their checkpoint, so that a task may be killed, requeued or submitted
# again at any time, with any array size. Take memory and time from `mach train CONFIG --dry-run`: "bytes a worker" for
# each worker of a task (by default one a processor).
#SBATCH --job-name=mach
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
#SBATCH --output=mach-%A-%a.log
set -euo pipefail

if (($# < 2)); then
    echo "usage: sbatch --array=0-N $0 CONFIG RUN [option of mach train ...]" >&2
    exit 2
fi
config=$1 run=$2
shift 2
python=${PYTHON:-python3} # of an environment in which mach is installed
count='import sys; from mach.config import load_config; print(load_config(sys.argv[1]).hashing.repetitions)'
repetitions=${REPETITIONS:-$("$python" -c "$count" "$config")} # set it where --set raises them

task=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))
step=${SLURM_ARRAY_TASK_STEP:-1}
tasks=$(((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN) / step + 1))
task=$((task / step))
first=$((task * repetitions / tasks))
last=$(((task + 1) * repetitions / tasks - 1))
if ((last < first)); then
    echo "task $task of $tasks: nothing to train, the run has $repetitions repetitions"
    exit 0
fi
echo "task $task of $tasks: repetitions $first-$last of $repetitions on $(hostname)"

told=
"$python" -m mach.cli train "$config" "$run" --repetitions "$first-$last" "$@" &
child=$!
# SLURM warns two minutes before the end, and before it takes the node away: the state is saved within seconds.
trap 'told=yes; kill -TERM "$child" 2>/dev/null || true' TERM
wait "$child" && code=0 || code=$?
if [[ $told ]]; then # the trap interrupted the first wait
    wait "$child" && code=0 || code=$?
    if ((code == 3)); then # not complete: the same task again, now or when there is a node
        scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" || true
    fi
fi
exit "$code"
