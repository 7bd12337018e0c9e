#!/usr/bin/env bash
# A Slurm cluster of two nodes, with two GPUs each that are only counted, on this one machine. Needs root and Slurm.
#
#   bash tests/cluster/local_slurm.sh up FOLDER        start it, write FOLDER/up, and end it when standard input ends
#   bash tests/cluster/local_slurm.sh in FOLDER COMMAND ...   run a command where it is the cluster
#   bash tests/cluster/local_slurm.sh install          Slurm and munge, by apt-get
#
# It lives in namespaces of its own: its /etc/hosts is a copy, its network is a loopback device that nothing else is on, and
# its processes end with the first of them, however that ends. So nothing of it stays, and no port or file can be in the way.
set -euo pipefail

case ${1-} in
  install)
    export DEBIAN_FRONTEND=noninteractive
    timeout 120 apt-get update -qq
    timeout 120 apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge iproute2
    exit
    ;;
  up)
    unshare --mount --pid --net --fork --kill-child --mount-proc bash "$0" inside "$2" <&0 &
    while kill -0 $! 2>/dev/null; do
      [[ ! -e $2/ready ]] || { cat "/proc/$!/task/$!/children" >"$2/up.new" && mv "$2/up.new" "$2/up" && break; }
      sleep 0.1
    done
    wait $!
    exit
    ;;
  in)
    export SLURM_CONF=$2/slurm.conf
    exec nsenter --target "$(tr -d ' ' <"$2/up")" --mount --pid --net --wd="$PWD" -- "${@:3}"
    ;;
  inside) folder=$2 ;;
  *) sed -n '2,7s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac

# ---- inside ----------------------------------------------------------------------------------------------------------

host=$(hostname -s)
mkdir -p "$folder"/{state,spool,log}
export SLURM_CONF=$folder/slurm.conf

ip link set lo up
ip address add 10.0.0.1/32 dev lo # a machine with 127.0.0.1 alone has no network, to the resolver
printf '127.0.0.1 localhost\n10.0.0.1 %s node1 node2\n' "$host" >"$folder/hosts"
mount --bind "$folder/hosts" /etc/hosts

(umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
munged --force --key-file="$folder/munge.key" --socket="$folder/munge" --pid-file="$folder/munged.pid" \
  --log-file="$folder/log/munged" --seed-file="$folder/munge.seed"

# cred_expire: the time for which a job that is queued again must wait. CPUs=1: two jobs at a time, for two real cores.
cat >"$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=$host(10.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge,cred_expire=5
CredType=cred/munge
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld
SlurmdLogFile=$folder/log/%n
SlurmdParameters=config_overrides
MinJobAge=3600
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
KillWait=10
GresTypes=gpu
NodeName=node[1-2] NodeHostname=$host NodeAddr=10.0.0.1 Port=[7001-7002] CPUs=1 RealMemory=4000 Gres=gpu:2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=node[1-2] MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
CONF
for gpu in 0 1; do mknod "$folder/gpu$gpu" c 1 3; done
echo "NodeName=node[1-2] Name=gpu File=$folder/gpu[0-1]" >"$folder/gres.conf"
echo 'CgroupPlugin=cgroup/v1' >"$folder/cgroup.conf" # asked for, and not used

slurmctld
slurmd -N node1
slurmd -N node2
for _ in {1..150}; do
  if [[ $(sinfo --noheader --format=%D --states=idle) == 2 ]]; then
    touch "$folder/ready"
    cat >/dev/null # until the other side closes it
    exit
  fi
  sleep 0.2
done
sinfo >&2
tail -n 5 "$folder"/log/* >&2
exit 1
