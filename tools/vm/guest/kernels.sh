#!/bin/bash
# Runs inside the new guest root, as its root: puts the kernels into it, and builds for each of them the three
# modules that Debian leaves out, vkms, vimc and sw_sync.
#
# The kernel packages are unpacked, not installed: installing them would bring initramfs-tools and make an initramfs
# for each, which takes minutes and which nobody boots here.
#
# For each kernel it leaves /kernels/SERIES/{vmlinuz,initrd,release}, which the host side takes out.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive LC_ALL=C

# Series and suite. "release" is the suite that the root was made from.
kernels=("6.12 release" "7.2 backports")

say() { echo "guest: $*"; }
die() { echo "guest: $*" >&2; exit 1; }

suite=$(. /etc/os-release && echo "$VERSION_CODENAME")

# The backports suite lives on the same mirror: derive its line from the one that is there.
add_backports() {
	local line
	line=$(grep -rhE "^deb .* $suite main" /etc/apt/sources.list /etc/apt/sources.list.d | head -n1 | grep .) ||
		die "no '$suite main' line in the guest's apt sources to derive the backports line from"
	echo "${line/ $suite main/ $suite-backports main}" >/etc/apt/sources.list.d/backports.list
	apt-get -qq update || die "cannot read the package lists of $suite-backports"
}

# The newest package whose name matches the pattern $1, in version order of the name.
newest() {
	apt-cache --names-only search "$1" | cut -d' ' -f1 | sort -V | tail -n1
}

# Unpacks packages into the directory $1 without installing them.
unpack() {
	local into=$1 deb
	shift
	rm -rf /build/debs
	mkdir -p /build/debs
	(cd /build/debs && apt-get -qq -o APT::Sandbox::User=root download "$@") || die "cannot download: $*"
	for deb in /build/debs/*.deb; do
		dpkg-deb --extract "$deb" "$into"
	done
	rm -rf /build/debs
}

# A kernel package is mostly modules for hardware that an emulated machine cannot have. Keeps the modules listed here
# and what they need, unpacked, which is cheaper once here than at each boot under emulation.
prune_modules() {
	local release=$1 dir=/usr/lib/modules/$1
	modprobe -S "$release" -a --show-depends \
		virtio_pci virtio_blk virtio_console virtio_rng virtio-gpu bochs ext4 overlay fuse loop 9p 9pnet_virtio \
		vivid vgem vkms vimc sw_sync uvcvideo v4l2-mem2mem configfs \
		2>/dev/null | awk '$1 == "insmod" { print $2 }' | sed "s#^/lib/#/usr/lib/#" | sort -u >/build/keep || true
	find "$dir" -name '*.ko*' | sort | comm -23 - /build/keep | xargs -r rm
	find "$dir" -name '*.ko.xz' -print0 | xargs -0 -r -n 64 xz -d
	find "$dir/kernel" -type d -empty -delete
	depmod "$release"
}

build_module() {
	local series=$1 release=$2 dir=$3
	make -s -j"$(nproc)" -C "/lib/modules/$release/build" M="/build/source-$series/$dir" \
		CONFIG_DRM_VKMS=m CONFIG_VIDEO_VIMC=m CONFIG_DEBUG_INFO_BTF_MODULES= modules >"/build/log-$series" 2>&1 ||
		{ tail -n 30 "/build/log-$series" >&2; die "cannot build $dir for $release"; }
}

# Applies a patch to a source tree, where it fits: not every kernel has what it changes.
apply() {
	local release=$1 name=$2 tree=$3
	if patch -s -f --dry-run -d "$tree" -p1 <"/patches/$name.patch" >/dev/null; then
		patch -s -f -d "$tree" -p1 <"/patches/$name.patch"
	else
		say "kernel $release: $name.patch does not fit: built without it"
	fi
}

# sw_sync is a part of the kernel by its own recipe, or nowhere. Its two files make a module just as well.
sw_sync_module() {
	local dir=$1
	# Its trace events are looked for from a folder two below the source's root (TRACE_INCLUDE_PATH in sync_trace.h).
	# shellcheck disable=SC2016 # make's variable
	printf '%s\n' 'obj-m := sw-sync.o' 'sw-sync-y := sw_sync.o sync_debug.o' \
		'ccflags-y := -include linux/module.h -I$(src)/../../include/media' >"$dir/Makefile"
	# What Linux 6.12 lists for people would need a name that modules may not ask for.
	sed -i 's/sync_file_get_name(sync_file, buf, sizeof(buf))/sync_file->user_name/' "$dir/sync_debug.c"
	echo 'MODULE_LICENSE("GPL");' >>"$dir/sync_debug.c"
}

# Unpacks from the kernel source only what is built, and builds it.
build_modules() {
	local series=$1 release=$2 tarball src=/build/source-$1 dir
	unpack "/build/pkg-$series" "linux-source-$series"
	tarball=$(echo /build/pkg-"$series"/usr/src/linux-source-"$series".tar.*)
	mkdir -p "$src"
	tar -xf "$tarball" -C "$src" --strip-components=1 --wildcards \
		'*/drivers/gpu/drm/vkms' '*/drivers/media/test-drivers/vimc' '*/include/media/tpg' '*/drivers/dma-buf/s[wy]*'
	sw_sync_module "$src/drivers/dma-buf"
	rm -rf "/build/pkg-$series"
	# As it is first, for the tests of what dmaflow does about its fault; then with the patches that fit.
	build_module "$series" "$release" drivers/gpu/drm/vkms
	install -D -m 644 -t "/lib/modules/$release/stock" "$src"/drivers/gpu/drm/vkms/vkms.ko
	apply "$release" vkms-planes "$src"
	# vkms takes this header from the packages. Only what is built here sees the change.
	apply "$release" fixed-point "/usr/src/linux-headers-${release%-amd64}-common"
	for dir in drivers/gpu/drm/vkms drivers/media/test-drivers/vimc drivers/dma-buf; do
		build_module "$series" "$release" "$dir"
		install -D -m 644 -t "/lib/modules/$release/extra" "$src/$dir"/*.ko
	done
	strip --strip-debug "/lib/modules/$release"/{extra,stock}/*.ko
	# Beside the modules' tree, where modprobe does not see it: insmod loads it.
	mkdir -p /usr/lib/dmaflow-vm
	mv "/lib/modules/$release/stock" "/usr/lib/dmaflow-vm/$release"
}

# An initramfs with busybox and what is needed to find the root disk; the init script comes with each run.
make_initrd() {
	local series=$1 release=$2 dir=/build/initrd-$1 ko
	mkdir -p "$dir"/{bin,dev,proc,sys,root,modules}
	cp /usr/bin/busybox "$dir/bin/busybox"
	ln -s busybox "$dir/bin/sh"
	# In the order that modprobe would load them in.
	for ko in $(modprobe -S "$release" -a --show-depends virtio_pci virtio_blk ext4 | awk '$1 == "insmod" { print $2 }' | awk '!seen[$0]++'); do
		cp "$ko" "$dir/modules/"
		basename "$ko" >>"$dir/modules/order"
	done
	(cd "$dir" && find . | busybox cpio -o -H newc 2>/dev/null) >"/kernels/$series/initrd"
}

# Debian ships a kernel as one package, or (seen with 7.2) as an empty one beside three others.
kernel_packages() {
	local name
	for name in "linux-image-$1" "linux-base-$1" "linux-binary-$1" "linux-modules-$1"; do
		if apt-cache show "$name" >/dev/null 2>&1; then echo "$name"; fi
	done
}

add_kernel() {
	local series=$1 from=$2 image release
	image=$(newest "^linux-image-${series//./\\.}\.[0-9].*[0-9]-amd64\$")
	[ -n "$image" ] || die "the $from suite has no kernel $series any more: change the list in guest/kernels.sh"
	release=${image#linux-image-}
	say "kernel $release: unpack"
	# shellcheck disable=SC2046 # one word a package
	unpack / $(kernel_packages "$release")
	unpack / "linux-headers-$release" "linux-headers-${release%-amd64}-common" "linux-kbuild-${release%-amd64}"
	say "kernel $release: build vkms, vimc and sw_sync"
	build_modules "$series" "$release"
	depmod "$release"
	prune_modules "$release"
	mkdir -p "/kernels/$series"
	echo "$release" >"/kernels/$series/release"
	for image in "/boot/vmlinuz-$release" "/usr/lib/modules/$release/vmlinuz"; do
		if [ -e "$image" ]; then mv "$image" "/kernels/$series/vmlinuz"; fi
	done
	[ -e "/kernels/$series/vmlinuz" ] || die "no vmlinuz in the packages of $release"
	make_initrd "$series" "$release"
}

mkdir -p /build
add_backports
apt-get -qq -y -o Dpkg::Use-Pty=0 install --no-install-recommends gcc libc6-dev libelf1t64 make patch xz-utils >/build/log-apt 2>&1 ||
	{ tail -n 30 /build/log-apt >&2; die "cannot install the compiler"; }
for k in "${kernels[@]}"; do
	# shellcheck disable=SC2086 # two words on purpose
	add_kernel $k
done

say "tidy up"
rm -rf /usr/src/linux-* /usr/lib/linux-kbuild-* /lib/modules/*/build /lib/modules/*/source /build
find /boot -mindepth 1 -delete
apt-get -qq -y purge --auto-remove gcc libc6-dev make patch xz-utils >/dev/null 2>&1
rm -f /etc/apt/sources.list.d/backports.list
