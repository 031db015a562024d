//! Fences by way of the socket, as far as pipes will do for fences: they are open until something is written, and no sync files. What needs
//! such is tested on devices (ci/device/share_fences.rs).

use std::os::fd::OwnedFd;

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, poll};
use nix::unistd::{pipe2, write};

use super::*;
use crate::fence::SyncFile;

/// A fence that is open, and its other end: it has signalled when something is written there.
fn open_fence() -> (SyncFile, OwnedFd) {
    let (reader, writer) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
    (SyncFile::from(reader), writer)
}

/// Whether nobody has the fence of this end any more.
fn is_closed(end: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(end.as_fd(), PollFlags::empty())];
    poll(&mut fds, 0u16).unwrap() == 1 && fds[0].revents().unwrap().contains(PollFlags::POLLERR)
}

fn signal(end: &OwnedFd) {
    assert_eq!(write(end, b"x"), Ok(1));
}

/// The next frame of the source, presented with an open fence.
fn present_fenced(source: &mut Pattern, server: &mut Server) -> (Frame, OwnedFd) {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        source.recycle().unwrap();
        if let Some(frame) = source.try_next(Ready::FRAME).unwrap() {
            let (fence, signal) = open_fence();
            let frame = frame.with_acquire_fence(fence);
            server.present(frame.clone()).unwrap();
            return (frame, signal);
        }
        server.dispatch().unwrap();
        assert!(Instant::now() < end, "the source starves: {}", source.slots());
        thread::sleep(Duration::from_micros(200));
    }
}

/// The positions of the fences that came by a socket.
fn fences(socket: &Socket) -> Vec<u64> {
    let mut positions = Vec::new();
    loop {
        match socket.receive(true).unwrap() {
            Received::Message(Message::Fence { position }, fds) => {
                assert_eq!(fds.len(), 1);
                positions.push(position);
            }
            Received::Message(..) => {}
            Received::Nothing | Received::Closed => return positions,
        }
    }
}

/// A ring as a program has it that nobody wrote here.
struct Ring(Mapping);

impl Ring {
    fn of(fds: &[OwnedFd]) -> Ring {
        Ring(Mapping::new(fds[0].as_fd(), 4096, Access::ReadWrite).unwrap())
    }

    fn word(&self, at: usize) -> u64 {
        let mut bytes = [0; 8];
        self.0.read(at, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn state(&self, position: u64) -> u64 {
        self.word(192 + 64 * (position % 16) as usize)
    }

    fn set_state(&mut self, position: u64, stage: u64) {
        let at = 192 + 64 * (position % 16) as usize;
        self.0.write(at, &(position << 3 | stage).to_le_bytes());
    }

    /// Whether the entry says that a fence belongs to it.
    fn is_fenced(&self, position: u64) -> bool {
        self.word(192 + 64 * (position % 16) as usize + 8 * 3) & 1 << 37 != 0
    }
}

#[test]
fn a_fence_comes_before_its_frame() {
    let mut source = pattern(200.0, 6);
    let mut server = serve("fence", two(), &source);
    let (socket, fds) = raw(&mut server, "fence");
    let (other, _fds) = raw(&mut server, "fence");
    let ring = Ring::of(&fds);
    source.start().unwrap();
    let (frame, first) = present_fenced(&mut source, &mut server);
    assert!(ring.state(1) == 1 << 3 | 1 && ring.is_fenced(1));
    assert_eq!((fences(&socket), fences(&other)), (vec![1], vec![1]));
    drop(present(&mut source, &mut server));
    assert!(ring.state(2) == 2 << 3 | 1 && !ring.is_fenced(2));
    let (_, second) = present_fenced(&mut source, &mut server);
    assert_eq!((fences(&socket), fences(&other)), (vec![3], vec![3]));
    assert_eq!(server.fence_use().good, 3);
    // The source's own are the last.
    assert!(!is_closed(&first) && source.release_fences().is_empty());
    drop(frame);
    signal(&first);
    signal(&second);
    drop((socket, other));
    server.dispatch().unwrap();
    server.dispatch().unwrap();
    source.recycle().unwrap();
    assert!(is_closed(&first) && is_closed(&second), "the source closes what has signalled");
}

/// One that does not read its messages is skipped, with a bound on what is on its way to it; others go on, and so does it when it reads.
#[test]
fn who_does_not_read_fences_is_late() {
    let mut source = pattern(1000.0, 6);
    let mut server = serve("unread", two(), &source);
    let (deaf, fds) = raw(&mut server, "unread");
    let (other, other_fds) = raw(&mut server, "unread");
    // They have read what they were greeted with.
    assert!(fences(&deaf).is_empty() && fences(&other).is_empty());
    let (ring, mut other_ring) = (Ring::of(&fds), Ring::of(&other_fds));
    source.start().unwrap();
    let mut ends = Vec::new();
    for number in 1..=100 {
        let (frame, end) = present_fenced(&mut source, &mut server);
        drop(frame);
        signal(&end);
        ends.push(end);
        assert_eq!(fences(&other), [number]);
        other_ring.set_state(number, 3);
    }
    let infos = server.consumers();
    let given = infos[0].frames;
    assert!((8..=40).contains(&given) && infos[0].skipped == 100, "{infos:?}");
    assert_eq!((infos[0].leases, infos[1].frames, infos[1].skipped), (0, 100, 0), "{infos:?}");
    assert_eq!(ring.word(0), given + 1, "nothing old is left for it");
    // Frames without fences are given to it as ever.
    drop(present(&mut source, &mut server));
    assert_eq!(server.consumers()[0].leases, 1);
    assert_eq!(fences(&deaf), (1..=given).collect::<Vec<_>>());
    let (frame, end) = present_fenced(&mut source, &mut server);
    assert_eq!(fences(&deaf), [given + 2]);
    drop(frame);
    signal(&end);
    ends.push(end);
    drop((deaf, other));
    server.dispatch().unwrap();
    server.dispatch().unwrap();
    source.recycle().unwrap();
    assert!(ends.iter().all(is_closed), "a fence stays open");
}

/// A receiver takes nothing for a fence that is none, and closes it.
#[test]
fn what_is_no_sync_file_ends_the_stream() {
    let mut source = pattern(200.0, 4);
    let mut server = serve("no-fence", two(), &source);
    let mut receiver = connect(&mut server, "no-fence").unwrap();
    source.start().unwrap();
    drop(present(&mut source, &mut server));
    let (frame, end) = present_fenced(&mut source, &mut server);
    drop(receiver.try_next(Ready::FRAME).unwrap().unwrap());
    let error = receiver.try_next(Ready::FRAME).unwrap_err();
    assert!(error.kind() == Kind::Disconnected && error.line().contains("no sync file"), "{error:?}");
    drop((frame, receiver));
    signal(&end);
    server.dispatch().unwrap();
    source.recycle().unwrap();
    assert!(is_closed(&end) && server.consumers().is_empty());
}

/// One that says that it gives a frame back behind a fence has to send it before, and a fence it has to be.
#[test]
fn a_frame_that_is_given_back_behind_no_fence() {
    for case in 0..4 {
        let mut source = pattern(200.0, 4);
        let mut server = serve("release", two(), &source);
        let (socket, fds) = raw(&mut server, "release");
        let mut good = connect(&mut server, "release").unwrap();
        let mut ring = Ring::of(&fds);
        source.start().unwrap();
        drop(present(&mut source, &mut server));
        let (reader, end) = pipe2(OFlag::O_NONBLOCK).unwrap();
        let position = if case == 2 { 7 } else { 1 };
        if case > 0 {
            socket.send(&Message::Fence { position }, &[reader.as_fd()]).unwrap();
        }
        if case == 3 {
            socket.send(&Message::Fence { position }, &[]).unwrap();
        }
        drop(reader);
        // In one case it is heard before the ring is looked at.
        if case == 1 {
            server.dispatch().unwrap();
        }
        ring.set_state(1, 6);
        drop(present(&mut source, &mut server));
        drop(present(&mut source, &mut server));
        server.dispatch().unwrap();
        assert_eq!(last_words(&socket).unwrap().0, Reason::Broken, "{case}");
        let gone: Vec<_> = server.departures().map(|gone| gone.why.clone()).collect();
        let why = if case == 0 { "has not come" } else { "no sync file" };
        assert!(gone.len() == 1 && gone[0].contains(why), "{gone:?}");
        assert!(is_closed(&end) && server.consumers().len() == 1);
        // Nobody else notices, and the frame is back.
        for _ in 0..2 {
            good.recycle().unwrap();
            assert!(good.try_next(Ready::FRAME).unwrap().is_some());
        }
        good.recycle().unwrap();
        drop(present(&mut source, &mut server));
        assert_eq!(source.slots().dequeued, 1, "{case}");
    }
}

/// A frame whose release fence cannot be sent is kept until it has signalled, as one of a source in this process.
#[test]
fn a_release_fence_that_is_none_stays_here() {
    let mut source = pattern(200.0, 4);
    let mut server = serve("kept", two(), &source);
    let mut receiver = connect(&mut server, "kept").unwrap();
    source.start().unwrap();
    drop(present(&mut source, &mut server));
    let frame = receiver.try_next(Ready::FRAME).unwrap().unwrap();
    let (fence, end) = open_fence();
    frame.release_after(fence);
    drop(frame);
    receiver.recycle().unwrap();
    server.dispatch().unwrap();
    assert_eq!((server.consumers()[0].leases, receiver.release_fences().len()), (1, 1));
    signal(&end);
    receiver.recycle().unwrap();
    drop(present(&mut source, &mut server));
    assert_eq!((server.consumers()[0].leases, receiver.release_fences().len()), (1, 0));
    assert_eq!((server.consumers()[0].frames, receiver.revoked(), is_closed(&end)), (2, 0, true));
}
