#!/bin/bash
# How the tests get a real S3 server: Ceph on loopback (one monitor, one BlueStore OSD on a sparse file, radosgw), from
# Debian's packages, unpacked and not installed.
#   ceph_s3.sh fetch             unpack the packages (66 MB) under $CEPH_ROOT (default /var/tmp/ceph-root), once
#   ceph_s3.sh start DIR PORT    a new, empty cluster in DIR, S3 on 127.0.0.1:PORT (about 20 s); keys test / testtest123
#   ceph_s3.sh stop DIR          stop it; what it holds stays
#   ceph_s3.sh resume DIR        start it again (about 10 s)
set -euo pipefail
ROOT=${CEPH_ROOT:-/var/tmp/ceph-root}
ARCH=$(uname -m)-linux-gnu
usage() { sed -n '4,7s/^#   //p' "$0" >&2; exit 2; }
COMMAND=${1:-}

fetch() {
  [ -x "$ROOT/usr/bin/radosgw" ] && return
  local packages new
  packages=$(mktemp -d)
  new=$(mktemp -d "$ROOT.XXXXXX")
  cd "$packages"
  apt-get update -qq
  apt-get install -s --no-install-recommends radosgw ceph-osd ceph-mon ceph-common | awk '/^Inst/{print $2}' |
    xargs apt-get download -qq
  for package in *.deb; do dpkg -x "$package" "$new"; done
  # the daemons look for both kinds of plug-ins in the one folder that they are given
  (cd "$new/usr/lib/$ARCH/ceph" && ln -sf ../rados-classes/* . && ln -sf erasure-code/* .)
  rm -rf "$packages" "$ROOT"
  mv "$new" "$ROOT"  # last, so that an interrupted fetch is not taken for a whole one
}

if [ "$COMMAND" = fetch ]; then fetch; exit; fi
DIR=${2:-}
[ -n "$DIR" ] || usage
LIB=$ROOT/usr/lib/$ARCH
export LD_LIBRARY_PATH=$LIB:$ROOT/lib/$ARCH:$LIB/ceph:$ROOT/usr/lib/ceph
export PATH=$ROOT/usr/bin:$PATH PYTHONPATH=$ROOT/usr/lib/python3/dist-packages
export CEPH_CONF=$DIR/ceph.conf CEPH_LIB=$LIB/ceph

# Run "$@" up to 120 times, half a second apart, until it succeeds.
until_ok() {
  for _ in $(seq 120); do "$@" >/dev/null 2>&1 && return 0; sleep 0.5; done
  echo "no success within 60 s: $*" >&2
  return 1
}
osd_is_up() { ceph osd stat | grep -q '1 up'; }
monitor() { ceph-mon -i a --pid-file "$DIR/mon.a.pid" >/dev/null 2>&1; }
osd() { ceph-osd -i 0 --pid-file "$DIR/osd.0.pid" >/dev/null 2>&1; }
gateway() {
  radosgw -n client.rgw --pid-file "$DIR/rgw.pid" >/dev/null 2>&1
  until_ok curl -s -o /dev/null "http://$(sed -n 's/.*endpoint=//p' "$CEPH_CONF")"
}

stop() {
  local daemon pid
  for daemon in rgw osd.0 mon.a; do
    [ -f "$DIR/$daemon.pid" ] || continue
    pid=$(cat "$DIR/$daemon.pid")
    kill "$pid" 2>/dev/null || continue
    for _ in $(seq 60); do kill -0 "$pid" 2>/dev/null || break; sleep 0.5; done
  done
}

start() {
  local port=$1 monitor_port=$(($1 + 1)) osd_id
  mkdir -p "$DIR/mon" "$DIR/osd" "$DIR/run"
  cat >"$CEPH_CONF" <<CONF
[global]
fsid = $(cat /proc/sys/kernel/random/uuid)
mon_host = 127.0.0.1:$monitor_port
mon_initial_members = a
public_network = 127.0.0.0/8
cluster_network = 127.0.0.0/8
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_ipv4 = true
ms_bind_ipv6 = false
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
osd_pool_default_size = 1
osd_pool_default_min_size = 1
mon_allow_pool_size_one = true
osd_pool_default_pg_num = 8
osd_pool_default_pgp_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_max_pg_per_osd = 2000
run_dir = $DIR/run
admin_socket = $DIR/run/\$name.asok
log_file = $DIR/\$name.log
mon_cluster_log_file = $DIR/cluster.log
pid_file = $DIR/\$name.pid
keyring = $DIR/keyring
plugin_dir = $CEPH_LIB
erasure_code_dir = $CEPH_LIB/erasure-code
osd_erasure_code_plugins =
osd_class_dir = $LIB/rados-classes
mon_data = $DIR/mon
osd_data = $DIR/osd
osd_objectstore = bluestore
bluestore_block_size = 21474836480
bluestore_block_db_create = false
bluestore_block_wal_create = false
bluestore_cache_autotune = false
bluestore_cache_size = 268435456
osd_memory_target = 1073741824
osd_op_queue = wpq
mon_data_avail_warn = 2
mon_data_avail_crit = 1
mon_warn_on_insecure_global_id_reclaim_allowed = false
[client.rgw]
rgw_frontends = beast endpoint=127.0.0.1:$port
rgw_data = $DIR
pid_file = $DIR/rgw.pid
log_file = $DIR/rgw.log
CONF
  ceph-authtool --create-keyring "$DIR/keyring" --gen-key -n mon. --cap mon 'allow *' >/dev/null
  ceph-authtool "$DIR/keyring" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
  ceph-authtool "$DIR/keyring" --gen-key -n client.rgw --cap mon 'allow rw' --cap osd 'allow rwx'
  ceph-authtool "$DIR/keyring" --gen-key -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *'
  monmaptool --create --add a "127.0.0.1:$monitor_port" --fsid "$(sed -n 's/^fsid = //p' "$CEPH_CONF")" "$DIR/monmap" \
    >/dev/null
  ceph-mon --mkfs -i a --monmap "$DIR/monmap" --keyring "$DIR/keyring"
  monitor
  until_ok timeout 5 rados lspools
  osd_id=$(cat /proc/sys/kernel/random/uuid)
  ceph osd new "$osd_id" >/dev/null
  truncate -s 20G "$DIR/osd/block"
  ceph-osd -i 0 --mkfs --osd-uuid "$osd_id" >/dev/null 2>&1
  osd
  until_ok osd_is_up
  gateway
  radosgw-admin -n client.rgw user create --uid=test --display-name=test --access-key=test --secret-key=testtest123 \
    >/dev/null 2>&1
}

case $COMMAND in
  start) [ $# = 3 ] || usage; start "$3" ;;
  stop) stop ;;
  resume) monitor; osd; gateway ;;
  *) usage ;;
esac
