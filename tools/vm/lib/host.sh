# What the host must have. Sourced after common.sh.
# shellcheck shell=bash

# Installs the packages that are named as COMMAND-OR-FILE:PACKAGE and missing. Calls apt only if one is.
host_needs() {
	local pair missing=() sudo=()
	for pair; do
		case ${pair%%:*} in
			/*) [ -e "${pair%%:*}" ] || missing+=("${pair#*:}") ;;
			*) have "${pair%%:*}" || missing+=("${pair#*:}") ;;
		esac
	done
	[ ${#missing[@]} -gt 0 ] || return 0
	have apt-get || die "this host lacks ${missing[*]}, and has no apt to install them with"
	if [ "$(id -u)" -ne 0 ]; then
		have sudo || die "this host lacks ${missing[*]}: become root, or install sudo, and run again"
		sudo=(sudo)
	fi
	say "install on this host, with apt: ${missing[*]}"
	# The lists may be old or absent: read them again only if the first try fails.
	host_apt install "${missing[@]}" || { host_apt update && host_apt install "${missing[@]}"; } || {
		tail -n 15 "$apt_log" >&2
		rm -f "$apt_log"
		die "apt cannot install ${missing[*]}: is a package mirror reachable? (its own words are above)"
	}
	rm -f "$apt_log"
}

apt_log=${TMPDIR:-/tmp}/dmaflow-vm-apt.$$
host_apt() {
	local action=$1
	shift
	local options=(-q -y)
	[ "$action" = update ] || options+=(--no-install-recommends)
	"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get "${options[@]}" "$action" "$@" \
		</dev/null >"$apt_log" 2>&1
}

# PATH of an ordinary user often lacks the folder that mkfs.ext4 is in.
PATH=$PATH:/usr/sbin:/sbin

host_for_running() {
	host_needs qemu-system-x86_64:qemu-system-x86 cpio:cpio setpriv:util-linux flock:util-linux
}

host_for_making() {
	host_needs mmdebstrap:mmdebstrap mkfs.ext4:e2fsprogs \
		/usr/share/keyrings/debian-archive-keyring.gpg:debian-archive-keyring
	[ "$(id -u)" -eq 0 ] || host_needs newuidmap:uidmap
}

host_for_building() {
	have cargo || die "no cargo on this host: get Rust from https://rustup.rs, or by 'apt install rustup && rustup default stable'"
	host_needs cc:gcc /usr/include/stdio.h:libc6-dev
	have_libclang || host_needs /no/libclang:libclang-dev
}

# bindgen, in the build of the crate v4l, loads the library under one of these names. libclang-cpp is another library, which
# Mesa's LLVM brings to many machines that lack this one.
have_libclang() {
	[ -z "${LIBCLANG_PATH:-}" ] || return 0
	local folder name
	for folder in /usr/lib/llvm-*/lib /usr/lib/*-linux-gnu /usr/lib64 /usr/local/lib; do
		for name in 'libclang.so' 'libclang.so.*' 'libclang-[0-9]*.so*'; do
			! compgen -G "$folder/$name" >/dev/null || return 0
		done
	done
	return 1
}
