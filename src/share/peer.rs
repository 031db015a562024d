//! Who is at the other end of a connection, and whether it may be.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{getsockopt, sockopt};

/// `SO_PEERGROUPS` of asm-generic/socket.h (Linux 4.13), which no crate offers.
const SO_PEERGROUPS: libc::c_int = 59;

/// A process, as the kernel noted it when it connected (`SO_PEERCRED`, `SO_PEERGROUPS`).
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Peer {
    pub pid: u32,
    pub uid: u32,
    pub gid: u32,
    /// Those that it is in besides.
    pub groups: Vec<u32>,
}

impl Peer {
    pub(super) fn of(socket: impl AsFd) -> io::Result<Peer> {
        let socket = socket.as_fd();
        let peer = getsockopt(&socket, sockopt::PeerCredentials)?;
        // No process is one of another pid namespace.
        Ok(Peer { pid: peer.pid().cast_unsigned(), uid: peer.uid(), gid: peer.gid(), groups: groups(socket)? })
    }
}

/// The groups that the other end is in besides its own.
fn groups(socket: impl AsFd) -> io::Result<Vec<u32>> {
    let fd = socket.as_fd().as_raw_fd();
    // Few are in more; no process is in more than 65,536 (NGROUPS_MAX).
    let mut groups = vec![0u32; 64];
    loop {
        let mut len = libc::socklen_t::try_from(size_of_val(groups.as_slice())).map_err(|_| Errno::EOVERFLOW)?;
        // SAFETY: `groups` is writable for `len` bytes, as many 32-bit numbers (gid_t); the kernel writes no more and says how many.
        let got =
            unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, SO_PEERGROUPS, groups.as_mut_ptr().cast(), &mut len) };
        let count = usize::try_from(len).unwrap_or(0) / size_of::<u32>();
        match Errno::result(got) {
            Ok(_) => {
                groups.truncate(count);
                return Ok(groups);
            }
            // It says how much it would be (sk_getsockopt in net/core/sock.c).
            Err(Errno::ERANGE) if count > groups.len() => groups.resize(count, 0),
            // It has connected without groups; or the kernel does not tell.
            Err(Errno::ENODATA | Errno::ENOPROTOOPT) => return Ok(Vec::new()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Who may connect.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Access {
    pub anybody: bool,
    pub uids: Vec<u32>,
    pub gids: Vec<u32>,
}

impl Access {
    pub(super) fn allows(&self, peer: &Peer) -> bool {
        let in_group = |gid: &u32| peer.gid == *gid || peer.groups.contains(gid);
        self.anybody || is_own(peer.uid) || self.uids.contains(&peer.uid) || self.gids.iter().any(in_group)
    }
}

/// Whether it is the user of this process.
pub(super) fn is_own(uid: u32) -> bool {
    uid == nix::unistd::geteuid().as_raw()
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    #[test]
    fn the_kernel_says_who_it_is() {
        let (one, _other) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let peer = Peer::of(&one).unwrap();
        assert_eq!((peer.pid, peer.uid), (std::process::id(), nix::unistd::getuid().as_raw()));
        let mut groups: Vec<_> = nix::unistd::getgroups().unwrap().iter().map(|gid| gid.as_raw()).collect();
        let mut told = peer.groups;
        groups.sort_unstable();
        told.sort_unstable();
        assert_eq!(told, groups);
    }

    #[test]
    fn a_user_or_any_of_its_groups_must_be_allowed() {
        let other = nix::unistd::geteuid().as_raw() + 1;
        let peer = Peer { pid: 1, uid: other, gid: 100, groups: vec![44, 27] };
        let access = |uids: &[u32], gids: &[u32]| Access { anybody: false, uids: uids.into(), gids: gids.into() };
        assert!(!Access::default().allows(&peer) && !access(&[other + 1], &[1, 2]).allows(&peer));
        assert!(access(&[other], &[]).allows(&peer));
        assert!(access(&[], &[100]).allows(&peer) && access(&[], &[3, 44]).allows(&peer), "the first, or another");
        assert!(Access { anybody: true, ..Access::default() }.allows(&peer));
        assert!(Access::default().allows(&Peer { uid: other - 1, ..peer }), "its own user");
    }
}
