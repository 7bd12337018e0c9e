#!/usr/bin/env bash
# Upload what jobs have logged to W&B offline, from a machine that reaches the internet and is logged in (wandb login).
#
#   bash slurm/sync_wandb.sh runs/slmrec/default [more run folders] [options of wandb sync, such as --dry-run]
#
# Give it again at any time: what was uploaded before is left out, and a stage that is not done waits for the next time, for
# what it has logged is written anew, in one part that holds all of it, when it goes on.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

folders=() options=()
for argument; do
  if [[ $argument == -* ]]; then options+=("$argument"); else folders+=("$argument"); fi
done
if ((!${#folders[@]})); then
  sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi

parts=() before=0 waiting=()
for folder in "${folders[@]}"; do
  [[ -d $folder ]] || { echo "error: there is no run folder $folder." >&2 && exit 2; }
  for part in "$folder"/*/wandb/offline-run-*/; do
    [[ -d $part ]] || continue # the pattern itself, where nothing matches
    stage=${part%/wandb/*}
    if compgen -G "$part*.wandb.synced" >/dev/null; then
      before=$((before + 1))
    elif [[ ! -e $stage/DONE && ${stage##*/} != report ]]; then
      waiting+=("${stage##*/}")
    elif compgen -G "$part*.wandb" >/dev/null; then
      parts+=("${part%/}")
    fi
  done
done

echo "to upload: ${#parts[@]}; uploaded before: $before; not done yet: ${waiting[*]:-none}"
((${#parts[@]})) || exit 0
# shellcheck source=slurm/site.sh
source "${SITE_FILE:-$here/site.sh}"
activate
unset WANDB_MODE # which is offline for the jobs
"${PYTHON[@]}" -m wandb sync "${options[@]}" "${parts[@]}"
