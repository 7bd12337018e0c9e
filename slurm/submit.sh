#!/usr/bin/env bash
# Submit a recipe to Slurm: one job for each stage that is not done, each after the jobs of the stages that it needs.
#
#   bash slurm/submit.sh recipe=slmrec scale=paper [override ...]     what lit_llmers.fit takes; stage=NAME stops after it
#   bash slurm/submit.sh --dry-run recipe=slmrec                      print the commands, submit nothing
#   bash slurm/submit.sh --sweep student=sasrec,gru4rec recipe=rd     a run for each value; stages alike are run once
#
# What is particular to your cluster stands in slurm/site.sh, or in the file that the variable SITE_FILE names.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() { # MESSAGE
  echo "error: $1" >&2
  exit 2
}

# ---- the command line ------------------------------------------------------------------------------------------------

dry_run='' sweep='' until='' name='' overrides=()
while (($#)); do
  case $1 in
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0" && exit ;;
    --dry-run) dry_run=yes ;;
    --sweep)
      [[ -z $sweep ]] || fail "--sweep is given twice. Sweep one setting, and submit once for each value of the other."
      [[ ${2-} == ?*=?* ]] || fail "--sweep ${2-} is not KEY=VALUE,VALUE as in --sweep student=sasrec,gru4rec."
      sweep=$2
      shift
      ;;
    -*) fail "Unknown option $1. --help lists those there are." ;;
    only=*) fail "submit.sh chooses the stages by itself. To stop after one, say stage=${1#*=}." ;;
    stage=*) until=${1#*=} ;;
    run.name=*) name=${1#*=} ;;
    *) overrides+=("$1") ;;
  esac
  shift
done
((${#overrides[@]})) || fail "No recipe given. See --help."

site=$(realpath "${SITE_FILE:-$here/site.sh}")
# shellcheck source=slurm/site.sh
source "$site"
activate
command -v "${PYTHON[0]}" >/dev/null || fail "There is no ${PYTHON[0]}. Say in $site which ENVIRONMENT has lit_llmers, or make it."
[[ -n $dry_run ]] || command -v sbatch >/dev/null || fail "There is no sbatch here. --dry-run works without it."

# ---- one run of the recipe -------------------------------------------------------------------------------------------

READ_PLAN='
import json, sys
plan = json.load(sys.stdin)
print(plan["recipe"], plan["run"]["folder"], sep="|")
for s in plan["stages"]:
    several = s["repeated"] and len(s["seeds"]) > 1
    seeds = " ".join(map(str, s["seeds"])) if several else "all"
    print(s["name"], s["verb"], seeds, " ".join(s["needs"]), s["num_nodes"], s["devices"], int(s["accelerated"]),
          int(s["done"]), " ".join(s["folders"]), sep="|")
'
runs=0
submitted=()           # ids of all jobs of this command
declare -A maker_of=() # "job|run folder" that makes these stage folders, for the later runs of a sweep
declare -A job=()      # of the present run's stages, by name

submit_run() { # OVERRIDE ...
  local plan recipe folder stage verb seeds needs nodes tasks accelerated finished folders maker suffix=''
  ((++runs == 1)) || suffix=_$runs
  plan=$("${PYTHON[@]}" -m lit_llmers.plan "$@" --json) || refused $?
  plan=$("${PYTHON[@]}" -c "$READ_PLAN" <<<"$plan")
  [[ -z $until || $plan == *$'\n'"$until|"* ]] || fail "The recipe has no stage '$until' (stage=$until)."
  IFS='|' read -r recipe folder <<<"$plan"
  folder=$(realpath -m "$folder")
  job=()
  begin_run "$folder"
  while IFS='|' read -r stage verb seeds needs nodes tasks accelerated finished folders; do
    local gpus=$((accelerated ? tasks : 0))
    if ((finished)); then
      row "$stage" "done before"
    elif [[ -n ${maker_of[$folders]-} ]] && ! begun "$folder" "$folders"; then
      IFS='|' read -r "job[$stage]" maker <<<"${maker_of[$folders]}"
      share "$maker" "$folder" "$folders"
      row "$stage" "${job[$stage]:-done before}" "in $maker"
    else
      submit_stage "$@"
    fi
    maker_of[$folders]=${maker_of[$folders]-${job[$stage]-}|$folder}
    [[ $stage != "$until" ]] || break
  done < <(tail -n +2 <<<"$plan")
}

refused() { # STATUS -- what the plan has said is of one value of a sweep
  [[ -z $sweep ]] || echo "error: this was $key=$value of --sweep $sweep. Leave it out, or mend what is said of it." >&2
  exit "$1"
}

submit_stage() { # OVERRIDE ... -- and submit_run's variables
  local after='' names='' need log=$stage-%j.out partition=$CPU_PARTITION gpus_option
  local what=("--nodes=$nodes" "--ntasks-per-node=$tasks" "--cpus-per-task=$CPUS_PER_TASK")
  if ((gpus)); then
    partition=$PARTITION
    gpus_option=$(gpus "$gpus")
    [[ -z $gpus_option ]] || what+=("$gpus_option")
  fi
  if [[ $seeds != all ]]; then
    what+=("--array=0-$(($(wc -w <<<"$seeds") - 1))")
    log=$stage-%A_%a.out
  fi
  [[ -z $MEMORY_PER_CPU ]] || what+=("--mem-per-cpu=$MEMORY_PER_CPU")
  [[ -z $partition ]] || what+=("--partition=$partition")
  [[ -z $ACCOUNT ]] || what+=("--account=$ACCOUNT")
  what+=("--time=$(time_limit "$verb")" "--signal=USR1@$GRACE" "${OPTIONS[@]}")
  for need in $needs; do
    [[ -z ${job[$need]-} ]] || after+=:${job[$need]} names+=${names:+,}$need
  done
  [[ -z $after ]] || what+=(--kill-on-invalid-dep=yes "--dependency=afterok$after")
  local where=("--job-name=$stage.$recipe.${folder##*/}" "--comment=$folder" "--chdir=$PWD" "--output=$folder/slurm/$log")
  local script=("$here/stage.sbatch" "$site" "$stage" "$seeds" "$@")

  if [[ -n $dry_run ]]; then
    job[$stage]=\$${stage//[^A-Za-z0-9_]/_}$suffix
    # shellcheck disable=SC2016
    printf '%s=$(sbatch --parsable %s \\\n  %s \\\n  %s)\n' "${job[$stage]#\$}" \
      "$(quoted "${what[@]}")" "$(quoted "${where[@]}")" "$(quoted "${script[@]}")"
  else
    job[$stage]=$(sbatch --parsable "${what[@]}" "${where[@]}" "${script[@]}")
    job[$stage]=${job[$stage]%%;*} # a federation of clusters adds the cluster's name
    submitted+=("${job[$stage]}")
    log=${log//%[jA]/${job[$stage]}}
    row "$stage" "${job[$stage]}" "$nodes x $tasks" "$gpus" "${names:--}" "${log//%a/*}"
  fi
}

# ---- around it -------------------------------------------------------------------------------------------------------

begin_run() { # FOLDER -- no run gets a second chain while its first is in the queue
  echo "# $1: the output of each job is in its folder slurm/"
  if [[ -z $dry_run ]]; then
    local queued
    queued=$(squeue --me --noheader --format='%i|%k' | while IFS='|' read -r id run; do [[ $run != "$1" ]] || echo "$id"; done)
    [[ -z $queued ]] || fail "Jobs of $1 are in the queue: ${queued//$'\n'/ }. Wait for them, or scancel them first."
    row stage job 'nodes x tasks' GPUs after output
  fi
  prepare mkdir -p "$1/slurm"
}

begun() { # FOLDER STAGE-FOLDERS -- whether a run has stages of its own
  local each
  for each in $2; do
    [[ ! -d $1/$each || -L $1/$each ]] || return 0
  done
  return 1
}

share() { # MAKER FOLDER STAGE-FOLDERS -- let a run read stages that another one makes
  local each
  for each in $3; do
    prepare mkdir -p "$1/$each"
    prepare ln -sfn "$(realpath -m --relative-to="$2" "$1")/$each" "$2/$each"
  done
}

prepare() { # COMMAND ...
  if [[ -n $dry_run ]]; then quoted "$@"; else "$@"; fi
}

row() { # STAGE JOB [REMARK | NODES-X-TASKS GPUS AFTER OUTPUT]
  if [[ -n $dry_run ]]; then
    echo "# $1: $2${3:+ $3}"
  elif (($# < 6)); then
    printf '%-20s %-12s %s\n' "$1" "$2" "${3-}"
  else
    printf '%-20s %-12s %-13s %-5s %-28s %s\n' "$@"
  fi
}

quoted() { # WORD ... -- for a shell to read again
  local word words=()
  for word in "$@"; do
    [[ $word == --dependency=* || $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
    words+=("$word")
  done
  echo "${words[*]}"
}

undo() { # a chain is submitted whole or not at all
  local status=$?
  if ((status && ${#submitted[@]})); then
    scancel "${submitted[@]}"
    echo "error: the chain could not be submitted whole, so its jobs were cancelled again: ${submitted[*]}" >&2
  fi
}
trap undo EXIT

# ---- all runs --------------------------------------------------------------------------------------------------------

if [[ -z $sweep ]]; then
  submit_run "${overrides[@]}" ${name:+"run.name=$name"}
else
  key=${sweep%%=*} values=${sweep#*=}
  [[ $values != '['*']' ]] || { values=${values#'['} && values=${values%']'}; }
  [[ $values != *['[]{}']* ]] || fail "--sweep $sweep: a value cannot be a list or a mapping. Submit once for each of them."
  IFS=',' read -ra values <<<"$values"
  for value in "${values[@]}"; do
    submit_run "${overrides[@]}" "$key=$value" "run.name=${name:-default}-${key##*.}-${value//[^A-Za-z0-9._-]/-}"
  done
fi
