#!/bin/bash
# make.sh CACHE TARGET: makes the guest in a temporary folder in CACHE and renames it to TARGET at the end. The caller
# holds the lock, so any temporary folder that is there already was left by a set-up that was interrupted.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd -P)
cache=$1 target=$2
suite=trixie
need_mib=4000

say() { printf 'vm: %s\n' "$*" >&2; }
fail() { printf 'vm: error: %s\n' "$*" >&2; exit 1; }

# Removes what a set-up left. --one-file-system: should something still be mounted in an unfinished root, it must not be
# touched. In a user namespace the root's files belong to ids that only the namespace may remove.
discard() {
	local tries
	for tries in 1 2 3 4 5; do
		rm -rf --one-file-system "$@" 2>/dev/null && return
		if [ "$mode" = unshare ]; then
			mmdebstrap --unshare-helper rm -rf --one-file-system "$@" >/dev/null 2>&1 && return
		fi
		sleep "0.$tries"
	done
	say "cannot remove all of: $*"
}

user=$(id -un)
if [ "$(id -u)" -eq 0 ]; then
	mode=root
	work=$cache
	# mmdebstrap's processes and mounts live in namespaces of their own, which end with it, however it ends.
	contain=(unshare --mount --propagation private --pid --mount-proc --kill-child)
else
	mode=unshare
	contain=()
	# The namespace's users must reach the root folder, and a home folder is often closed to others.
	work=/var/tmp/dmaflow-vm-$user
	mkdir -p "$work"
	chmod 1777 "$work"
	grep -qs "^$user:" /etc/subuid ||
		fail "user $user has no range in /etc/subuid: run 'sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 $user', or run this as root"
fi

discard "$cache"/tmp.* "$work"/mmdebstrap.* "$work"/image.*

for folder in "$cache" "$work"; do
	free_mib=$(df -Pm "$folder" | awk 'NR == 2 { print $4 }')
	[ "$free_mib" -ge "$need_mib" ] ||
		fail "making the guest needs $need_mib MiB free in $folder, which has $free_mib (DMAFLOW_VM_CACHE names another folder)"
done

tmp=$(mktemp -d "$cache/tmp.XXXXXX")
pid=
cleanup() {
	trap - EXIT
	if [ -n "$pid" ]; then
		kill -KILL "$pid" 2>/dev/null || true
		wait "$pid" 2>/dev/null || true
	fi
	discard "$tmp" "$work"/mmdebstrap.* "$work"/image.*
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

say "make the guest, once: Debian $suite with kernels, Mesa and GStreamer; some hundred MB to fetch, some minutes"
start=$SECONDS
# The hook runs as the namespace's root, which cannot look into a closed home folder.
install -m 755 "$here/make-image.sh" "$work/image.hook"
packages=$(sed 's/#.*//' "$here/packages" | xargs | tr ' ' ,)
TMPDIR=$work setpriv --pdeathsig KILL "${contain[@]}" mmdebstrap --mode="$mode" --variant=minbase --format=null --include="$packages" \
	--aptopt='Acquire::Languages "none"' --aptopt='Acquire::Retries "3"' \
	--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
	--dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
	--customize-hook="copy-in '$here/kernels.sh' '$here/patches' /" \
	--customize-hook="chroot \"\$1\" /kernels.sh" \
	--customize-hook="'$work/image.hook' \"\$1\"" \
	--customize-hook="tar-out /out '$tmp/out.tar'" \
	"$suite" /dev/null </dev/null >"$tmp/log" 2>&1 &
pid=$!

# Ctrl-C reaches the trap at once while this waits; the progress is what the recipe says about itself.
shown=0
while kill -0 "$pid" 2>/dev/null; do
	sleep 1
	while read -r line; do
		say "$line"
		shown=$((shown + 1))
	done < <(grep '^guest: ' "$tmp/log" 2>/dev/null | tail -n "+$((shown + 1))")
done
if ! wait "$pid"; then
	pid=
	grep -v '^guest: ' "$tmp/log" | tail -n 20 >&2
	if grep -qE 'Could not resolve|Failed to fetch|Could not connect|Connection (refused|timed out)|Unable to connect|Temporary failure' "$tmp/log"; then
		fail "a package mirror could not be reached (step: mmdebstrap $suite; its own words are above)"
	fi
	if grep -q 'NO_PUBKEY' "$tmp/log"; then
		fail "this host's debian-archive-keyring is too old for $suite: get a newer one"
	fi
	fail "making the guest failed (step: mmdebstrap $suite; its own words are above)"
fi
pid=

tar -xf "$tmp/out.tar" -C "$tmp" --strip-components=1 --no-same-owner
rm -f "$tmp/out.tar"
fallocate --dig-holes "$tmp/root.img" || true
discard "$work"/mmdebstrap.* "$work"/image.*
touch "$tmp/complete"
rm -rf "$target"
mv "$tmp" "$target"
say "the guest is ready after $((SECONDS - start)) s: $(du -sh "$target" | cut -f1) in $target"

# Guests of older recipes that nobody has used for a month.
find "$cache" -mindepth 2 -maxdepth 2 -name complete -mtime +30 -printf '%h\n' | xargs -r rm -rf
