#!/bin/sh
# in_root.sh ROOT COMMAND...: run a command in a directory with a system of its
# own, in /src there. The mounts are this process' alone, and go with it.
set -eu
if [ "${IN_ROOT:-}" != 1 ]; then
    IN_ROOT=1 exec unshare --mount --propagation private "$0" "$@"
fi
root=$1; shift
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=1777 tmp "$root/tmp"
# Names and certificates by which this machine reaches its package index.
for path in /etc/resolv.conf /etc/hosts /etc/ssl/certs; do
    if [ -d $path ]; then mkdir -p "$root$path"; else touch "$root$path"; fi
    mount --bind $path "$root$path"
done
unset IN_ROOT
exec chroot "$root" /bin/sh -c 'cd /src; exec "$@"' sh "$@"
