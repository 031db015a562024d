//! What goes wrong when one side does what it may, but at another moment or in another way than usual.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{MsgFlags, send};

use super::*;
use crate::frame::CowView;
use crate::share::listener::Listener;

/// Whether the descriptor becomes readable in this time.
fn readable(receiver: &Receiver, ms: u16) -> bool {
    poll(&mut [PollFd::new(receiver.as_fd(), PollFlags::POLLIN)], ms).unwrap() == 1
}

/// Views of the next two frames, which are dropped.
fn two_views(source: &mut Pattern, server: &mut Server, receiver: &mut Receiver) -> [CowView; 2] {
    [(); 2].map(|()| {
        drop(present(source, server));
        receiver.try_next(Ready::FRAME).unwrap().unwrap().view("tester").unwrap()
    })
}

/// All that it may have is in views, so it gets no frame, and nobody rings: what wakes it is that the views are due.
#[test]
fn one_that_keeps_all_in_views_is_woken_to_detach_them() {
    let mut source = pattern(20.0, 8);
    let mut server = serve("due", two(), &source);
    let mut receiver = connect(&mut server, "due").unwrap();
    source.start().unwrap();
    let views = two_views(&mut source, &mut server, &mut receiver);
    let end = Instant::now() + Duration::from_secs(20);
    while views.iter().any(|view| view.pages() == ViewPages::Device) {
        assert!(readable(&receiver, 10_000) && Instant::now() < end, "nobody woke it");
        assert!(receiver.try_next(Ready::FRAME).unwrap().is_none());
    }
    assert!(views.iter().all(|view| view.pages() == ViewPages::Detached));
    assert_eq!((receiver.revoked(), receiver.copies()[0].count), (0, 2));
    drop(present(&mut source, &mut server));
    assert!(receiver.try_next(Ready::FRAME).unwrap().is_some(), "it can have frames again");
    drop(views);
    // Without views nothing wakes it.
    while readable(&receiver, 0) {
        receiver.try_next(Ready::FRAME).unwrap();
    }
    assert!(!readable(&receiver, 400));
}

#[test]
fn who_waits_for_the_next_frame_alone_is_woken_for_that_too() {
    let mut source = pattern(20.0, 8);
    let mut server = serve("due-within", two(), &source);
    let mut receiver = connect(&mut server, "due-within").unwrap();
    source.start().unwrap();
    let views = two_views(&mut source, &mut server, &mut receiver);
    let waiting = thread::spawn(move || {
        let frame = receiver.next_within(Duration::from_secs(20)).unwrap();
        (frame.is_some(), receiver.revoked())
    });
    while !waiting.is_finished() {
        drop(present(&mut source, &mut server));
    }
    assert_eq!(waiting.join().unwrap(), (true, 0));
    assert_eq!(views[0].pages(), ViewPages::Detached);
}

/// A receiver that has just been woken by [`Receiver::next_within`], with what that gave.
fn woken(mut receiver: Receiver, publish: impl FnOnce()) -> (Receiver, crate::Result<Option<Frame>>) {
    let waiting = thread::spawn(move || {
        let next = receiver.next_within(Duration::from_secs(20));
        (receiver, next)
    });
    // Asleep by then; if not, what is tested is another order of the same.
    thread::sleep(Duration::from_millis(100));
    publish();
    waiting.join().unwrap()
}

/// Who has waited for a frame by the call may wait for the next by the descriptor.
#[test]
fn both_ways_to_wait_may_be_mixed() {
    let mut source = pattern(200.0, 6);
    let mut server = serve("mixed", two(), &source);
    let mut receiver = connect(&mut server, "mixed").unwrap();
    source.start().unwrap();
    for round in 0..6 {
        // One frame, or two: then there is another already.
        let (back, next) = woken(receiver, || {
            for _ in 0..1 + round % 2 {
                drop(present(&mut source, &mut server));
            }
        });
        receiver = back;
        assert!(next.unwrap().is_some());
        if round % 2 == 0 {
            drop(present(&mut source, &mut server));
        }
        assert!(readable(&receiver, 5000), "a frame is there and nobody was told");
        let mut came = 0;
        while readable(&receiver, 0) {
            came += usize::from(receiver.try_next(Ready::FRAME).unwrap().is_some());
        }
        assert_eq!(came, 1);
    }
    // The same with a change of the format, whose first frame waits to be followed.
    let mut other = pattern(200.0, 4);
    let (mut receiver, next) = woken(receiver, || {
        server.join(other.layout(), other.rate(), other.buffers()).unwrap();
        other.start().unwrap();
        drop(present(&mut other, &mut server));
    });
    // What was said comes first, and may be all that woke it.
    let next = match next {
        Ok(None) => receiver.next_within(Duration::from_secs(20)),
        next => next,
    };
    assert_eq!(next.unwrap_err().kind(), Kind::FormatChanged);
    receiver.follow().unwrap();
    assert!(readable(&receiver, 5000), "a frame is there and nobody was told");
    assert!(receiver.try_next(Ready::FRAME).unwrap().is_some());
}

/// The frame that told of a new format is no frame any more when the program follows.
#[test]
fn what_was_taken_back_before_it_was_followed_is_not_handed_out() {
    let mut source = pattern(200.0, 4);
    let mut server = serve("stale", two(), &source);
    let mut receiver = connect(&mut server, "stale").unwrap();
    let mut other = pattern(200.0, 4);
    source.start().unwrap();
    server.join(other.layout(), other.rate(), other.buffers()).unwrap();
    other.start().unwrap();
    drop(present(&mut other, &mut server));
    assert_eq!(receiver.try_next(Ready::FRAME).unwrap_err().kind(), Kind::FormatChanged);
    // Takes all back.
    drop(server);
    receiver.follow().unwrap();
    assert_eq!(receiver.try_next(Ready::FRAME).unwrap_err().kind(), Kind::Ended);
    assert_eq!(receiver.revoked(), 1);
}

/// A source whose format changes many times without a frame that comes here is in order.
#[test]
fn many_changes_without_a_frame_are_followed_at_once() {
    let mut source = pattern(200.0, 4);
    let mut server = serve("changes", two(), &source);
    let mut receiver = connect(&mut server, "changes").unwrap();
    source.start().unwrap();
    // Of the first change there is a frame in the ring, which nobody takes before it is forgotten.
    for round in 0..80 {
        server.join(source.layout(), source.rate(), source.buffers()).unwrap();
        if round == 0 {
            drop(present(&mut source, &mut server));
        }
        receiver.hear();
    }
    let last = present(&mut source, &mut server);
    assert_eq!(receiver.try_next(Ready::FRAME).unwrap_err().kind(), Kind::FormatChanged);
    receiver.follow().unwrap();
    assert_eq!(receiver.try_next(Ready::FRAME).unwrap().unwrap().meta(), last.meta());
}

/// Who does not read what it is told is told the rest when it does, and loses nothing of it; until then it gets no frame.
#[test]
fn what_cannot_be_said_now_is_said_later() {
    let mut source = pattern(200.0, 4);
    let mut server = serve("later", two(), &source);
    let (slow, _fds) = raw(&mut server, "later");
    let mut good = connect(&mut server, "later").unwrap();
    source.start().unwrap();
    let mut generations = 1;
    while !server.consumers.iter().any(|consumer| consumer.is_untold()) {
        server.join(source.layout(), source.rate(), source.buffers()).unwrap();
        good.hear();
        generations += 1;
        assert!(generations < 10_000);
    }
    drop(present(&mut source, &mut server));
    let infos = server.consumers();
    assert_eq!((infos.len(), infos[0].frames, infos[0].skipped), (2, 0, 1), "{infos:?}");
    // It reads at last: every format with its buffers, in turn.
    let mut heard = Vec::new();
    let end = Instant::now() + Duration::from_secs(20);
    while heard.len() < generations * 5 && Instant::now() < end {
        match slow.receive(true).unwrap() {
            Received::Message(Message::Format(shape), _) => heard.push((shape.generation, 0)),
            Received::Message(Message::Buffer { generation, index, .. }, _) => heard.push((generation, index + 1)),
            Received::Nothing => {
                server.dispatch().unwrap();
                thread::sleep(Duration::from_millis(1));
            }
            other => unreachable!("{other:?}"),
        }
    }
    let all = (1..=generations as u32).flat_map(|generation| (0..5).map(move |message| (generation, message)));
    assert!(heard == all.collect::<Vec<_>>(), "{} of {generations} * 5", heard.len());
    drop(present(&mut source, &mut server));
    assert_eq!((server.consumers()[0].frames, server.departed()), (1, 0));
}

/// One that never reads goes, and the others do not wait for it.
#[test]
fn who_does_not_read_while_others_wait_for_that_goes() {
    let source = pattern(200.0, 4);
    let mut server = serve("unread", two(), &source);
    let (_slow, _fds) = raw(&mut server, "unread");
    while !server.consumers[0].is_untold() {
        server.join(source.layout(), source.rate(), source.buffers()).unwrap();
    }
    let begun = Instant::now();
    while server.departed() == 0 {
        let mut fds = [PollFd::new(server.event_fd().unwrap(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, 5000u16).unwrap(), 1);
        server.dispatch().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(20));
    }
    assert!(begun.elapsed() >= Duration::from_secs(2));
    let gone = server.departures().next().unwrap();
    assert!(gone.why.contains("does not read") && !gone.at_fault && !gone.left, "{gone:?}");
}

/// A first packet that is no hello is noted, once a second at most; one of another version is told what is spoken here.
#[test]
fn who_does_not_say_hello_is_noted_and_answered() {
    let source = pattern(200.0, 2);
    let mut server = serve("first", two(), &source);
    let mut says = |bytes: &[u8]| {
        let socket = Socket::connect(&Place::parse(&name("first"))).unwrap();
        send(socket.as_fd().as_raw_fd(), bytes, MsgFlags::empty()).unwrap();
        server.dispatch().unwrap();
        server.dispatch().unwrap();
        socket
    };
    let mut hello = Message::Hello { writable: false, name: "x".into() }.encode();
    hello[4] = 9;
    let (reason, text) = last_words(&says(&hello)).unwrap();
    assert!(reason == Reason::Refused && text.contains("version 1") && text.contains('9'), "{text}");
    for _ in 0..100 {
        assert_eq!(last_words(&says(b"GET / HTTP/1.1")), None);
    }
    drop(Socket::connect(&Place::parse(&name("first"))).unwrap());
    server.dispatch().unwrap();
    let gone: Vec<_> = server.departures().collect();
    assert!((1..=20).contains(&gone.len()) && server.departed() == gone.len() as u64, "{gone:?}");
    assert!(gone[0].why.contains("version 9") && gone[0].at_fault && !gone[0].left, "{gone:?}");
    assert_eq!(gone[0].consumer.pid, std::process::id());
    // A consumer that hangs up has left; nobody need be told.
    drop(connect(&mut server, "first").unwrap());
    server.dispatch().unwrap();
    assert!(server.departures().last().is_some_and(|gone| gone.left && !gone.at_fault));
}

/// A server without a place says so, and that this may pass: it is tried again where a receiver is to come back.
#[test]
fn a_server_that_is_full_may_have_a_place_later() {
    let place = Place::parse(&name("full"));
    let listener = Listener::bind(&place, 0o600, None).unwrap();
    let connecting = thread::spawn(|| Receiver::connect(&name("full"), "tester"));
    let (socket, _) = loop {
        if let Some(connection) = listener.accept().unwrap() {
            break connection;
        }
        thread::sleep(Duration::from_millis(1));
    };
    let full = Message::End { reason: Reason::Full, text: "it has 64 consumers already".into() };
    socket.send(&full, &[]).unwrap();
    let error = connecting.join().unwrap().unwrap_err();
    assert!(error.kind() == Kind::Busy && error.line().contains("64"), "{error:?}");
}

#[test]
fn mode_and_group_of_a_name_without_a_file_are_refused() {
    for request in [ServerRequest { mode: Some(0o660), ..two() }, ServerRequest { group: Some(44), ..two() }] {
        assert_eq!(Server::bind(&name("no-file"), request).unwrap_err().kind(), Kind::Invalid);
    }
    let request = ServerRequest { allow_uids: vec![1000], ..two() };
    assert!(Server::bind(&name("no-file"), request).is_ok());
}

/// Nobody makes a server close a descriptor before it is known who that is, whatever the kernel: only consumers of its own user may send it
/// any, with the message that has one.
#[test]
fn descriptors_of_strangers_never_come_to_the_server() {
    let source = pattern(200.0, 2);
    let mut server = serve("unwanted", two(), &source);
    let file = || -> OwnedFd { std::fs::File::open("/dev/null").unwrap().into() };
    let hello = Message::Hello { writable: false, name: "x".into() };
    let socket = Socket::connect(&Place::parse(&name("unwanted"))).unwrap();
    let first = socket.send(&hello, &[file().as_fd()]);
    server.dispatch().unwrap();
    server.dispatch().unwrap();
    let (late, _fds) = raw(&mut server, "unwanted");
    let second = late.send(&hello, &[file().as_fd()]);
    server.dispatch().unwrap();
    assert!(second.is_ok());
    let faults = server.departures().filter(|gone| gone.why.contains("descriptors")).count();
    // From Linux 6.16 on the first could not even be sent.
    assert_eq!(faults, 1 + usize::from(first.is_ok()));
}
