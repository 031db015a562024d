//! Who is woken, by whom, and how often: the bells, the descriptor, and those who ring or tell for nothing.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{MsgFlags, send};
use nix::unistd::{pipe, write};

use super::*;
use crate::fence::SyncFile;
use crate::share::area::SharedArea;
use crate::share::bell::Bell;
use crate::share::entry::Entry;
use crate::share::give::Gift;
use crate::share::join::{ANSWER, Hello, Joining, Wish};
use crate::share::listener::Listener;
use crate::share::ring;
use crate::share::wire::{Shape, Timing, Welcome};

fn readable(fd: impl AsFd, ms: u16) -> bool {
    poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], ms).unwrap() == 1
}

/// A consumer that is none: its connection, and what came with the welcome.
fn raw(server: &mut Server, test: &str) -> (Socket, SharedArea, Bell) {
    let socket = Socket::connect(&Place::parse(&name(test))).unwrap();
    socket
        .send(&Message::Hello { writable: false, name: "raw".into() }, &[])
        .unwrap();
    loop {
        server.dispatch().unwrap();
        let Received::Message(message, fds) = socket.receive(true).unwrap() else { continue };
        assert!(matches!(message, Message::Welcome(_)));
        let [ring, bell] = <[OwnedFd; 2]>::try_from(fds).unwrap();
        return (socket, SharedArea::open(ring.as_fd()).unwrap(), Bell::from_fd(bell).unwrap());
    }
}

/// To ring is to make the server look, so it may be done for each frame that is given back and for nothing else.
#[test]
fn one_that_rings_for_nothing_is_disconnected() {
    let mut source = pattern(500.0, 8);
    let mut server = serve("rings", two(), &source);
    let (_socket, area, bell) = raw(&mut server, "rings");
    let mut consumer = ring::Consumer::new(area.clone());
    source.start().unwrap();
    for _ in 0..200 {
        drop(present(&mut source, &mut server));
        area.release(consumer.take().unwrap().position).unwrap();
        bell.ring().unwrap();
        server.dispatch().unwrap();
    }
    assert_eq!(server.consumers().len(), 1, "{:?}", server.departures().last());
    let mut rings = 0;
    while server.consumers().len() == 1 {
        bell.ring().unwrap();
        server.dispatch().unwrap();
        rings += 1;
        assert!(rings < 100, "it may ring for ever");
    }
    let gone = server.departures().last().unwrap();
    assert!(gone.at_fault && gone.why.contains("rings"), "{gone:?}");
}

/// Nor by bytes out of band, which a socket reads otherwise; and one whose end is closed would be readable for ever.
#[test]
fn a_bell_that_cannot_be_silenced_is_given_up() {
    let source = pattern(1.0, 8);
    let mut server = serve("silenced", two(), &source);
    let silent = |server: &Server| !readable(server.event_fd().unwrap(), 0);
    for close in [false, true] {
        let (_socket, _area, bell) = raw(&mut server, "silenced");
        assert!(silent(&server) && server.consumers().len() == 1);
        match close {
            true => drop(bell),
            false => {
                let urgent = MsgFlags::MSG_OOB | MsgFlags::MSG_DONTWAIT;
                for _ in 0..3 {
                    // Each is heard before the next: of several all but the last are in band.
                    let _ = send(bell.as_fd().as_raw_fd(), b"x", urgent);
                    server.dispatch().unwrap();
                }
            }
        }
        for _ in 0..3 {
            server.dispatch().unwrap();
        }
        let gone = server.departures().last().unwrap();
        assert_eq!((server.consumers().len(), gone.left, gone.at_fault), (0, close, !close), "{gone:?}");
        assert!(silent(&server));
    }
}

/// A program that keeps the last frame until the next comes, as for differences between pictures: consumers that have the others are heard.
#[test]
fn who_presents_a_frame_may_keep_it() {
    let mut source = pattern(500.0, 3);
    let mut server = serve("keeps", ServerRequest { lease: Some(Duration::from_secs(60)), ..two() }, &source);
    let mut receiver = connect(&mut server, "keeps").unwrap();
    source.start().unwrap();
    let mut kept = present(&mut source, &mut server);
    for round in 0..10 {
        let mut held = vec![receiver.try_next(Ready::FRAME).unwrap().unwrap()];
        drop(std::mem::replace(&mut kept, present(&mut source, &mut server)));
        held.extend(receiver.try_next(Ready::FRAME).unwrap());
        drop(std::mem::replace(&mut kept, present(&mut source, &mut server)));
        drop(held);
        receiver.recycle().unwrap();
        let end = Instant::now() + Duration::from_secs(10);
        // As a program that waits for source and server: it calls neither before one of them says so.
        while source.slots().free + source.slots().queued == 0 {
            assert!(readable(server.event_fd().unwrap(), 5000) && Instant::now() < end, "{round}: nobody tells of it");
            server.dispatch().unwrap();
        }
        drop(std::mem::replace(&mut kept, present(&mut source, &mut server)));
    }
    drop(kept);
}

/// Frames that whoever presents them has for a moment longer leave the source no shorter of buffers.
#[test]
fn what_is_just_passing_takes_no_frame_from_anybody() {
    let mut source = pattern(500.0, 4);
    let mut server = serve("passing", ServerRequest { lease: Some(Duration::from_millis(1)), ..two() }, &source);
    let mut receiver = connect(&mut server, "passing").unwrap();
    source.start().unwrap();
    let held = [(); 2].map(|()| {
        drop(present(&mut source, &mut server));
        receiver.try_next(Ready::FRAME).unwrap().unwrap()
    });
    thread::sleep(Duration::from_millis(5));
    for _ in 0..20 {
        // It has the frame until it is presented, as a pipe does.
        drop(present(&mut source, &mut server));
    }
    let info = &server.consumers()[0];
    assert!(held.iter().all(|frame| receiver.holds(frame)), "{info:?}");
    assert_eq!((info.stolen, info.skipped), (0, 20));
}

/// Whoever waits by the call and by the descriptor in turn is woken for each frame, however close one comes to the call.
#[test]
fn frames_come_at_any_moment_of_both_ways_to_wait() {
    let done = Arc::new(AtomicBool::new(false));
    let mut source = pattern(1000.0, 8);
    let mut server = serve("moments", ServerRequest { budget: 15, ..two() }, &source);
    let mut receiver = connect(&mut server, "moments").unwrap();
    source.start().unwrap();
    let frame = present(&mut source, &mut server);
    let serving = thread::spawn({
        let done = Arc::clone(&done);
        move || {
            let mut number = 0_u32;
            while !done.load(Ordering::Relaxed) {
                server.present(frame.clone()).unwrap();
                number = number.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (0..number >> 20).for_each(|_| std::hint::spin_loop());
            }
        }
    });
    for round in 0..4000 {
        assert!(receiver.next_within(Duration::from_secs(20)).unwrap().is_some(), "{round}");
        assert!(readable(&receiver, 20_000), "{round}: nobody rings any more");
        drop(receiver.try_next(Ready::FRAME).unwrap());
    }
    done.store(true, Ordering::Relaxed);
    serving.join().unwrap();
}

/// A server that is none, and its receiver.
struct Liar {
    ring: ring::Server<SharedArea, ()>,
    memory: Mapping,
    bell: Bell,
    /// Its end is the server's.
    _socket: Socket,
}

fn liar(test: &str) -> (Liar, Receiver) {
    let place = Place::parse(&name(test));
    let listener = Listener::bind(&place, 0o600, None).unwrap();
    let hello = Hello { place, name: "tester".into(), wish: Wish::Read, answer: ANSWER };
    let mut joining = Joining::begin(&hello).unwrap();
    let socket = listener.accept().unwrap().unwrap().0;
    let (area, memfd) = SharedArea::create().unwrap();
    let (bell, theirs) = Bell::pair().unwrap();
    let welcome = Welcome { budget: 1, fences: false, source: "liar".into() };
    socket
        .send(&Message::Welcome(welcome), &[memfd.as_fd(), theirs.as_fd()])
        .unwrap();
    let source = pattern(1.0, 1);
    let (timing, layout) = (Timing { lease_us: 60_000_000, rate_micro: 0, watchdog_us: 0 }, *source.layout());
    let lens = vec![source.buffers()[0].memory_lens()[0] as u64];
    socket
        .send(&Message::Format(Shape { generation: 1, buffers: 1, timing, layout, lens }), &[])
        .unwrap();
    let gift = Gift::new(&source.buffers()[0], false).unwrap();
    let fds: Vec<_> = gift.fds(false).collect();
    let buffer = Message::Buffer { generation: 1, index: 0, identity: gift.identity(false) };
    socket.send(&buffer, &fds).unwrap();
    assert!(joining.step().unwrap());
    let memory = Mapping::new(memfd.as_fd(), size_of::<ring::Area>(), Access::ReadWrite).unwrap();
    let receiver = Receiver::of(hello, joining.joined().unwrap()).unwrap();
    (Liar { ring: ring::Server::new(area, 1), memory, bell, _socket: socket }, receiver)
}

/// A server that says all the time that a frame is there, and none is: each call ends.
#[test]
fn a_server_that_promises_frames_without_an_end_keeps_nobody() {
    let (mut liar, mut receiver) = liar("promises");
    let done = Arc::new(AtomicBool::new(false));
    let promising = thread::spawn({
        let done = Arc::clone(&done);
        move || {
            let mut head = 1_u64;
            while !done.load(Ordering::Relaxed) {
                head += 1;
                liar.memory.write(0, &head.to_ne_bytes());
            }
        }
    });
    for _ in 0..2000 {
        assert!(receiver.try_next(Ready::FRAME).unwrap().is_none());
    }
    assert!(receiver.next_within(Duration::from_millis(50)).unwrap().is_none());
    done.store(true, Ordering::Relaxed);
    promising.join().unwrap();
}

/// Who waits by the call alone is woken when a device is done with what it dropped, and gives that back.
#[test]
fn release_fences_end_the_wait_for_a_frame() {
    let (mut liar, mut receiver) = liar("released");
    let entry = Entry { generation: 1, ..Entry::default() };
    liar.ring.publish(|_| entry.encode(), ()).unwrap();
    let frame = receiver.try_next(Ready::FRAME).unwrap().unwrap();
    let (fence, done) = pipe().unwrap();
    frame.release_after(Arc::new(SyncFile::from(fence)));
    drop(frame);
    let waiting = thread::spawn(move || receiver.next_within(Duration::from_secs(60)).unwrap().is_some());
    thread::sleep(Duration::from_millis(50));
    assert_eq!(liar.ring.collect(), Ok(1), "a device reads it");
    write(&done, b"x").unwrap();
    let end = Instant::now() + Duration::from_secs(30);
    while liar.ring.collect() != Ok(0) {
        assert!(Instant::now() < end, "it is not given back");
        thread::sleep(Duration::from_millis(1));
    }
    liar.ring.publish(|_| entry.encode(), ()).unwrap();
    liar.bell.ring().unwrap();
    assert!(waiting.join().unwrap());
    // Until here it had a server.
    drop(liar);
}
