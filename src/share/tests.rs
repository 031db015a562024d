mod again;
mod before;
mod fences;
mod guard;
mod taken_back;
mod wakes;

use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use super::socket::{Place, Received, Socket};
use super::wire::{Message, Reason};
use super::*;
use crate::endpoint::{Ready, Sink, Source};
use crate::error::Kind;
use crate::frame::{Frame, ViewPages};
use crate::memory::{Access, Allocator, Mapping};
use crate::pattern::{Pattern, PatternRequest};

/// A name without a file, for one test.
fn name(test: &str) -> String {
    format!("@dmaflow-{test}-{}", std::process::id())
}

/// Two frames for each.
fn two() -> ServerRequest {
    ServerRequest { budget: 2, ..ServerRequest::default() }
}

fn pattern(rate: f64, buffers: u32) -> Pattern {
    let request = PatternRequest { rate, buffers, allocator: Some(Allocator::Plain), ..PatternRequest::default() };
    Pattern::new(&request).unwrap()
}

fn serve(test: &str, request: ServerRequest, source: &Pattern) -> Server {
    let mut server = Server::bind(&name(test), request).unwrap();
    server.describe("pattern", source.watchdog());
    server.join(source.layout(), source.rate(), source.buffers()).unwrap();
    server
}

/// Connects while the server looks.
fn connect(server: &mut Server, test: &str) -> crate::Result<Receiver> {
    let place = name(test);
    let connecting = thread::spawn(move || Receiver::connect(&place, "tester"));
    while !connecting.is_finished() {
        server.dispatch().unwrap();
        thread::sleep(Duration::from_millis(1));
    }
    connecting.join().unwrap()
}

/// The next frame of the source, presented; recycles as a pipe does.
fn present(source: &mut Pattern, server: &mut Server) -> Frame {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        source.recycle().unwrap();
        if let Some(frame) = source.try_next(Ready::FRAME).unwrap() {
            server.present(frame.clone()).unwrap();
            return frame;
        }
        server.dispatch().unwrap();
        assert!(Instant::now() < end, "the source starves: {}", source.slots());
        thread::sleep(Duration::from_micros(200));
    }
}

fn pixels(frame: &Frame) -> Vec<u8> {
    let layout = frame.buffer().layout();
    let mut bytes = vec![0; layout.memory_len(0)];
    frame.buffer().read().unwrap().memory(0).unwrap().read(0, &mut bytes);
    bytes
}

#[test]
fn every_consumer_gets_the_sources_own_frames() {
    let mut source = pattern(200.0, 6);
    let mut server = serve("frames", two(), &source);
    let mut receivers = [(); 2].map(|()| connect(&mut server, "frames").unwrap());
    assert_eq!(
        (receivers[0].source(), receivers[0].budget(), receivers[0].lease()),
        ("pattern", 2, Duration::from_millis(15))
    );
    // The server's own comes first, so that it can say why no frame comes.
    let watchdog = source.watchdog().map(|time| 2 * time + Duration::from_secs(1));
    assert_eq!((receivers[0].rate(), receivers[0].watchdog()), (source.rate(), watchdog));
    receivers[1].come_back_to_it().unwrap();
    assert_eq!(receivers[1].watchdog(), None, "silence is as if the server were away");
    assert_eq!((receivers[1].layout(), receivers[1].buffers().len()), (source.layout(), 6));
    source.start().unwrap();
    for place in 0..40 {
        let frame = present(&mut source, &mut server);
        for receiver in &mut receivers {
            let got = receiver.try_next(Ready::FRAME).unwrap().unwrap();
            assert_eq!((got.meta(), place), (frame.meta(), place));
            assert_eq!(give::identity(got.buffer()).unwrap(), give::identity(frame.buffer()).unwrap());
            assert!(pixels(&got) == pixels(&frame) && receiver.holds(&got));
            assert!(receiver.try_next(Ready::FRAME).unwrap().is_none());
        }
    }
    let infos = server.consumers();
    assert_eq!((infos.len(), infos[0].pid, infos[0].name.as_str()), (2, std::process::id(), "tester"));
    assert!(infos.iter().all(|info| (info.frames, info.skipped, info.stolen) == (40, 0, 0)));
    // What is on its way comes before the end.
    let last = present(&mut source, &mut server);
    source.stop().unwrap();
    server.end();
    drop(server);
    let [mut receiver, _] = receivers;
    assert_eq!(receiver.try_next(Ready::FRAME).unwrap().unwrap().meta(), last.meta());
    assert_eq!(receiver.try_next(Ready::FRAME).unwrap_err().kind(), Kind::Ended);
    assert_eq!((receiver.skipped(), receiver.revoked(), receiver.copies().len()), (0, 0, 0));
}

/// From publication to taking, of each consumer by itself, in µs; known when the next frame is published.
#[test]
fn how_late_frames_are_taken_is_told() {
    let mut source = pattern(200.0, 6);
    let mut server = serve("latency", two(), &source);
    let mut receivers = [(); 3].map(|()| connect(&mut server, "latency").unwrap());
    source.start().unwrap();
    let late = Duration::from_millis(30);
    for _ in 0..5 {
        let (frame, start) = (present(&mut source, &mut server), Instant::now());
        drop(receivers[0].try_next(Ready::FRAME).unwrap().unwrap());
        let soon = start.elapsed();
        thread::sleep(late);
        drop(receivers[1].try_next(Ready::FRAME).unwrap().unwrap());
        // The third takes none.
        drop(frame);
        receivers.iter_mut().for_each(|receiver| receiver.recycle().unwrap());
        let infos = server.consumers();
        // This machine may have stopped between the two clocks of this test: then it knows nothing.
        if let (Some(first), true) = (infos[0].latency, soon < late) {
            assert!(first.median_us < 30_000, "{first:?}");
        }
    }
    present(&mut source, &mut server);
    let infos = server.consumers();
    let second = infos[1].latency.unwrap();
    assert!((30_000..20_000_000).contains(&second.median_us), "{second:?}");
    assert!(second.median_us <= second.p99_us && second.p99_us <= second.max_us, "{second:?}");
    assert_eq!((infos[0].latency.unwrap().measured, second.measured, infos[2].latency), (5, 5, None));
}

#[test]
fn one_that_keeps_all_it_gets_is_stolen_from_and_the_others_go_on() {
    let mut source = pattern(200.0, 3);
    let mut server = serve("keeper", two(), &source);
    let (mut keeper, mut other) = (connect(&mut server, "keeper").unwrap(), connect(&mut server, "keeper").unwrap());
    source.start().unwrap();
    let (mut kept, mut came) = (Vec::new(), 0);
    while came < 60 {
        drop(present(&mut source, &mut server));
        if kept.len() < 4 {
            kept.extend(keeper.try_next(Ready::FRAME).unwrap());
        }
        // It keeps one frame at a time, for no longer than until the next.
        came += u32::from(other.try_next(Ready::FRAME).unwrap().is_some());
        other.recycle().unwrap();
    }
    let infos = server.consumers();
    assert!(infos[0].stolen >= 1, "{infos:?}");
    assert_eq!((infos[1].stolen, other.revoked()), (0, 0), "{infos:?}");
    assert!(!keeper.holds(&kept[0]));
    kept.clear();
    keeper.recycle().unwrap();
    assert_eq!(keeper.revoked(), infos[0].stolen);
}

#[test]
fn the_lease_runs_out_also_when_no_frame_comes() {
    let mut source = pattern(20.0, 2);
    let mut server = serve("timer", two(), &source);
    let mut keeper = connect(&mut server, "timer").unwrap();
    source.start().unwrap();
    let mut kept = Vec::new();
    for _ in 0..2 {
        drop(present(&mut source, &mut server));
        kept.extend(keeper.try_next(Ready::FRAME).unwrap());
    }
    source.recycle().unwrap();
    assert_eq!((kept.len(), source.slots().queued, server.wants_event()), (2, 0, true));
    // The source has nothing to fill, so no frame will say that time has passed.
    let mut fds = [nix::poll::PollFd::new(server.event_fd().unwrap(), nix::poll::PollFlags::POLLIN)];
    assert_eq!(nix::poll::poll(&mut fds, 5000u16).unwrap(), 1);
    server.dispatch().unwrap();
    assert!(!keeper.holds(&kept[0]) && keeper.holds(&kept[1]));
    source.recycle().unwrap();
    assert_eq!(source.slots().queued, 1);
}

#[test]
fn a_release_that_is_waited_for_is_heard_at_once() {
    let mut source = pattern(100.0, 2);
    let request = ServerRequest { lease: Some(Duration::from_secs(60)), ..two() };
    let mut server = serve("bell", request, &source);
    let mut receiver = connect(&mut server, "bell").unwrap();
    source.start().unwrap();
    let mut kept = Vec::new();
    for _ in 0..2 {
        drop(present(&mut source, &mut server));
        kept.extend(receiver.try_next(Ready::FRAME).unwrap());
    }
    server.dispatch().unwrap();
    kept.pop();
    receiver.recycle().unwrap();
    let mut fds = [nix::poll::PollFd::new(server.event_fd().unwrap(), nix::poll::PollFlags::POLLIN)];
    assert_eq!(nix::poll::poll(&mut fds, 5000u16).unwrap(), 1);
    server.dispatch().unwrap();
    source.recycle().unwrap();
    assert_eq!((source.slots().queued, receiver.holds(&kept[0])), (1, true));
}

#[test]
fn a_consumer_that_hangs_up_gives_everything_back() {
    let mut source = pattern(200.0, 4);
    let mut server = serve("hang-up", two(), &source);
    let mut receiver = connect(&mut server, "hang-up").unwrap();
    source.start().unwrap();
    let mut kept = Vec::new();
    for _ in 0..2 {
        drop(present(&mut source, &mut server));
        kept.extend(receiver.try_next(Ready::FRAME).unwrap());
    }
    assert_eq!(server.consumers()[0].leases, 2);
    let shown = pixels(&kept[0]);
    drop(receiver);
    server.dispatch().unwrap();
    assert_eq!((server.consumers(), source.slots().dequeued), (vec![], 0));
    let gone: Vec<_> = server.departures().collect();
    assert_eq!((gone.len(), gone[0].consumer.frames, gone[0].at_fault), (1, 2, false));
    // Its buffers stay its own.
    assert_eq!(shown.len(), pixels(&kept[0]).len());
}

#[test]
fn a_server_that_is_gone_takes_its_frames_back_or_ends_in_order() {
    let mut source = pattern(200.0, 4);
    let mut server = serve("gone", two(), &source);
    let mut receivers = [(); 2].map(|()| connect(&mut server, "gone").unwrap());
    source.start().unwrap();
    drop(present(&mut source, &mut server));
    let frames = receivers
        .each_mut()
        .map(|receiver| receiver.try_next(Ready::FRAME).unwrap().unwrap());
    server.fail("its plug was pulled");
    drop(server);
    assert!(receivers[0].holds(&frames[0]), "it was ended");
    let error = receivers[0].try_next(Ready::FRAME).unwrap_err();
    assert!(error.kind() == Kind::Disconnected && error.line().contains("its plug was pulled"), "{error:?}");
    let mut server = serve("gone", two(), &source);
    let mut receiver = connect(&mut server, "gone").unwrap();
    drop(present(&mut source, &mut server));
    let frame = receiver.try_next(Ready::FRAME).unwrap().unwrap();
    drop(server);
    assert!(!receiver.holds(&frame), "its source may go on");
    assert_eq!(receiver.try_next(Ready::FRAME).unwrap_err().kind(), Kind::Ended);
    assert_eq!(Receiver::connect(&name("gone"), "late").unwrap_err().kind(), Kind::NotFound);
}

#[test]
fn a_change_of_format_is_followed_and_frames_of_before_stay() {
    let mut source = pattern(200.0, 4);
    let mut server = serve("format", ServerRequest { budget: 3, ..two() }, &source);
    let mut receiver = connect(&mut server, "format").unwrap();
    source.start().unwrap();
    drop(present(&mut source, &mut server));
    let before = receiver.try_next(Ready::FRAME).unwrap().unwrap();
    drop(present(&mut source, &mut server));
    let request = PatternRequest {
        size: (320, 240),
        rate: 50.0,
        buffers: 5,
        allocator: Some(Allocator::Plain),
        ..PatternRequest::default()
    };
    let mut other = Pattern::new(&request).unwrap();
    server.describe("pattern", Some(Duration::from_secs(7)));
    server.join(other.layout(), other.rate(), other.buffers()).unwrap();
    other.start().unwrap();
    let first = present(&mut other, &mut server);
    // What was on its way comes first.
    assert_eq!(receiver.try_next(Ready::FRAME).unwrap().unwrap().buffer().layout(), source.layout());
    assert_eq!(receiver.try_next(Ready::FRAME).unwrap_err().kind(), Kind::FormatChanged);
    assert_eq!((receiver.layout(), receiver.lease()), (source.layout(), Duration::from_millis(15)));
    receiver.follow().unwrap();
    // What depends on the rate follows as well.
    assert_eq!((receiver.lease(), receiver.lease()), (server.lease(), Duration::from_millis(60)));
    assert_eq!((receiver.rate(), receiver.watchdog()), (Some(50.0), Some(Duration::from_secs(15))));
    assert_eq!((receiver.layout(), receiver.buffers().len()), (other.layout(), 5));
    assert!(receiver.holds(&before));
    let got = receiver.try_next(Ready::FRAME).unwrap().unwrap();
    assert!(got.meta() == first.meta() && pixels(&got) == pixels(&first));
    drop(before);
    receiver.recycle().unwrap();
    assert_eq!(receiver.revoked(), 0);
    assert_eq!(receiver.agree(source.layout()).unwrap_err().kind(), Kind::Unsupported);
    assert!(receiver.agree(other.layout()).is_ok());
}

#[test]
fn views_are_detached_before_their_lease_runs_out() {
    let mut source = pattern(20.0, 3);
    let mut server = serve("views", two(), &source);
    let mut receiver = connect(&mut server, "views").unwrap();
    source.start().unwrap();
    drop(present(&mut source, &mut server));
    let frame = receiver.try_next(Ready::FRAME).unwrap().unwrap();
    let shown = pixels(&frame);
    let view = frame.view("tester").unwrap();
    drop(frame);
    receiver.recycle().unwrap();
    assert_eq!(view.pages(), ViewPages::Device);
    let end = Instant::now() + Duration::from_secs(20);
    while view.pages() == ViewPages::Device && Instant::now() < end {
        receiver.recycle().unwrap();
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!((view.pages(), receiver.revoked(), receiver.copies()[0].count), (ViewPages::Detached, 0, 1));
    for _ in 0..4 {
        drop(present(&mut source, &mut server));
    }
    let mut now = vec![0; shown.len()];
    view.read(0, 0, &mut now).unwrap();
    assert!(now == shown);
    assert_eq!(server.consumers()[0].stolen, 0);
}

/// A connection that speaks for itself: it has said hello, and has its welcome.
fn raw(server: &mut Server, test: &str) -> (Socket, Vec<std::os::fd::OwnedFd>) {
    let socket = Socket::connect(&Place::parse(&name(test))).unwrap();
    socket
        .send(&Message::Hello { writable: false, name: "raw".into() }, &[])
        .unwrap();
    server.dispatch().unwrap();
    server.dispatch().unwrap();
    let Received::Message(Message::Welcome(_), fds) = socket.receive(true).unwrap() else { unreachable!() };
    (socket, fds)
}

fn last_words(socket: &Socket) -> Option<(Reason, String)> {
    loop {
        match socket.receive(true).unwrap() {
            Received::Message(Message::End { reason, text }, _) => return Some((reason, text)),
            Received::Message(..) => {}
            Received::Nothing | Received::Closed => return None,
        }
    }
}

#[test]
fn who_writes_nonsense_is_disconnected_and_told_why() {
    let mut source = pattern(200.0, 4);
    let mut server = serve("nonsense", two(), &source);
    let (by_ring, fds) = raw(&mut server, "nonsense");
    let (by_socket, _fds) = raw(&mut server, "nonsense");
    let mut good = connect(&mut server, "nonsense").unwrap();
    source.start().unwrap();
    drop(present(&mut source, &mut server));
    assert!(good.try_next(Ready::FRAME).unwrap().is_some());
    let mut ring = Mapping::new(fds[0].as_fd(), 4096, Access::ReadWrite).unwrap();
    ring.write(192, &[0xa5; 1024]);
    by_socket
        .send(&Message::End { reason: Reason::Ended, text: String::new() }, &[])
        .unwrap();
    let (again, _fds) = raw(&mut server, "nonsense");
    again
        .send(&Message::Hello { writable: false, name: "again".into() }, &[])
        .unwrap();
    drop(present(&mut source, &mut server));
    server.dispatch().unwrap();
    assert!(good.try_next(Ready::FRAME).unwrap().is_some());
    let (reason, text) = last_words(&by_ring).unwrap();
    assert!(reason == Reason::Broken && text.contains("ring"), "{text}");
    assert_eq!(last_words(&again).unwrap().0, Reason::Broken);
    assert_eq!(last_words(&by_socket), None, "it left by itself");
    let mut faults: Vec<_> = server.departures().map(|gone| gone.at_fault).collect();
    faults.sort_unstable();
    assert_eq!((faults, server.consumers().len()), (vec![false, true, true], 1));
    drop(good);
    server.dispatch().unwrap();
    assert_eq!(source.slots().dequeued, 0);
}

#[test]
fn connections_without_a_hello_end_and_are_not_too_many() {
    let source = pattern(200.0, 2);
    let mut server = serve("hello", two(), &source);
    let place = Place::parse(&name("hello"));
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let sockets: Vec<_> = (0..MAX_CONSUMERS).map(|_| Socket::connect(&place).unwrap()).collect();
    for _ in 0..8 {
        server.dispatch().unwrap();
    }
    let late = Socket::connect(&place).unwrap();
    server.dispatch().unwrap();
    assert_eq!(last_words(&late).unwrap().0, Reason::Full);
    // Nonsense ends it at once.
    nix::sys::socket::send(
        std::os::fd::AsRawFd::as_raw_fd(&sockets[0].as_fd()),
        b"x",
        nix::sys::socket::MsgFlags::empty(),
    )
    .unwrap();
    server.dispatch().unwrap();
    assert!(matches!(sockets[0].receive(true).unwrap(), Received::Closed));
    assert!(matches!(sockets[1].receive(true).unwrap(), Received::Nothing));
    let mut fds = [nix::poll::PollFd::new(sockets[1].as_fd(), nix::poll::PollFlags::POLLIN)];
    let end = Instant::now() + Duration::from_secs(20);
    while nix::poll::poll(&mut fds, 50u16).unwrap() == 0 {
        server.dispatch().unwrap();
        assert!(Instant::now() < end);
    }
    assert!(
        sockets
            .iter()
            .all(|socket| matches!(socket.receive(true).unwrap(), Received::Closed))
    );
    drop(sockets);
    let before = open();
    for _ in 0..1000 {
        drop(Socket::connect(&place).unwrap());
        server.dispatch().unwrap();
    }
    server.dispatch().unwrap();
    // Other tests of this process open and close some meanwhile, so this sees no more than that most are closed. That none stays open is
    // seen where the server is a process of its own: `connections_that_are_dropped_leave_nothing` in ci/host/share.rs, of 10,000.
    assert!(open() < before + 200);
}

#[test]
fn a_server_that_lies_is_refused() {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let place = Place::parse(&name("liar"));
    let listener = super::listener::Listener::bind(&place, 0o600, None).unwrap();
    let connecting = thread::spawn(|| Receiver::connect(&name("liar"), "tester"));
    let (socket, _) = loop {
        if let Some(connection) = listener.accept().unwrap() {
            break connection;
        }
        thread::sleep(Duration::from_millis(1));
    };
    // A ring that could be cut off.
    let memfd = memfd_create("x", MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&memfd, 4096).unwrap();
    let welcome = super::wire::Welcome { budget: 2, fences: true, source: String::new() };
    socket.send(&Message::Welcome(welcome), &[memfd.as_fd(); 2]).unwrap();
    let error = connecting.join().unwrap().unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid);
    assert_eq!(error.errno(), Some(nix::libc::EPERM), "{error:?}");
}

/// Whoever waits for the descriptor before each call, as a pipe does, misses no frame.
#[test]
fn the_descriptor_is_readable_whenever_a_frame_is_there() {
    let readable = |receiver: &Receiver| {
        let mut fds = [nix::poll::PollFd::new(receiver.as_fd(), nix::poll::PollFlags::POLLIN)];
        nix::poll::poll(&mut fds, 0u16).unwrap() == 1
    };
    let mut source = pattern(500.0, 6);
    let mut server = serve("readable", two(), &source);
    let mut receiver = connect(&mut server, "readable").unwrap();
    source.start().unwrap();
    for round in 0..60 {
        // Now and then two come at once, or one between two calls.
        let frames = 1 + usize::from(round % 3 == 0);
        for _ in 0..frames {
            drop(present(&mut source, &mut server));
        }
        let mut more = 3;
        while readable(&receiver) {
            let frame = receiver.try_next(Ready::FRAME).unwrap();
            if frame.is_some() && round % 7 == 0 && more > 0 {
                more -= 1;
                drop(present(&mut source, &mut server));
            }
        }
        assert!(receiver.try_next(Ready::FRAME).unwrap().is_none(), "a frame was there and nobody was told");
    }
}

#[test]
fn requests_out_of_range_are_refused() {
    for budget in [0, 16, u32::MAX] {
        let request = ServerRequest { budget, ..two() };
        assert_eq!(Server::bind(&name("budget"), request).unwrap_err().kind(), Kind::Invalid);
    }
    let source = pattern(200.0, 2);
    let mut server = Server::bind(&name("budget"), two()).unwrap();
    assert!(server.join(source.layout(), None, &[]).is_err());
    assert_eq!(server.lease(), Duration::from_millis(100));
}
