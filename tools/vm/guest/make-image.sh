#!/bin/bash
# make-image.sh ROOT: a hook of mmdebstrap, runs as the root of its namespace. Turns ROOT into a disk image and leaves
# in ROOT/out what the host wants: root.img, kernels/, glibc.
set -euo pipefail
root=$1
PATH=$PATH:/usr/sbin:/sbin

# Not wanted in the image: apt's lists and caches.
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/* "$root"/kernels.sh "$root"/patches
mkdir -p "$root/out"
chroot "$root" ldd --version | sed -n '1s/.* //p' >"$root/out/glibc"
mv "$root/kernels" "$root/out/kernels"

image=$(dirname "$root")/image.$$
trap 'rm -f "$image"' EXIT
# mmdebstrap has mounted proc, sys and dev in ROOT: a bind mount of ROOT alone shows it without them. The image gets
# half a gigabyte of room, for what a command may write.
# shellcheck disable=SC2016 # the inner shell expands them
ROOT=$root IMAGE=$image unshare --mount bash -euo pipefail -c '
	mount --make-rprivate /
	mount --bind "$ROOT" /mnt
	size=$(du -xsm --exclude=/mnt/out /mnt | cut -f1)
	mkfs.ext4 -q -F -m 0 -O ^has_journal -E root_owner=0:0 -d /mnt "$IMAGE" $((size + size / 10 + 512))M
'
mv "$image" "$root/out/root.img"
