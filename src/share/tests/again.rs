//! Servers that come after each other at one place.

use super::*;
use crate::frame::Buffer;

/// Connects while the server looks, to write if it may.
fn connect_to_write(server: &mut Server, test: &str) -> Receiver {
    let place = name(test);
    let connecting = thread::spawn(move || Receiver::connect_writable_if_allowed(&place, "tester"));
    while !connecting.is_finished() {
        server.dispatch().unwrap();
        thread::sleep(Duration::from_millis(1));
    }
    connecting.join().unwrap().unwrap()
}

/// Until the receiver has come back.
fn follow(receiver: &mut Receiver, server: &mut Server) {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        server.dispatch().unwrap();
        match receiver.try_next(Ready::FRAME) {
            Ok(_) => thread::sleep(Duration::from_millis(1)),
            Err(error) => {
                assert_eq!(error.kind(), Kind::FormatChanged, "{error:?}");
                return receiver.follow().unwrap();
            }
        }
        assert!(Instant::now() < end, "it does not come back");
    }
}

/// Who would write reads where it may not, and asks each server anew.
#[test]
fn one_that_would_write_reads_where_it_may_not() {
    let writes = |receiver: &Receiver| receiver.buffers()[0].write().is_ok();
    for first in [true, false] {
        let test = format!("writes-{first}");
        // What one shares for reading stays so: each has its own.
        let sources = [(); 3].map(|()| pattern(200.0, 4));
        let serve = |number: usize, writable: bool| {
            let request = ServerRequest { writable, ..two() };
            serve(&test, request, &sources[number])
        };
        let mut server = serve(0, first);
        let mut receiver = connect_to_write(&mut server, &test);
        receiver.come_back_to_it().unwrap();
        assert_eq!(writes(&receiver), first);
        let kept: Vec<Buffer> = receiver.buffers().to_vec();
        for (number, writable) in [(1, !first), (2, first)] {
            drop(server);
            server = serve(number, writable);
            follow(&mut receiver, &mut server);
            assert_eq!(writes(&receiver), writable, "the server that is number {number}");
            assert_eq!(server.consumers().len(), 1);
        }
        assert_eq!(kept[0].write().is_ok(), first, "what it has of the first stays what it was");
    }
}

/// Who must write is refused where it may not, also when it comes back.
#[test]
fn one_that_must_write_does_not_read_instead() {
    let sources = [(); 2].map(|()| pattern(200.0, 4));
    let mut server = serve("must", ServerRequest { writable: true, ..two() }, &sources[0]);
    let connecting = thread::spawn(|| Receiver::connect_writable(&name("must"), "tester"));
    while !connecting.is_finished() {
        server.dispatch().unwrap();
        thread::sleep(Duration::from_millis(1));
    }
    let mut receiver = connecting.join().unwrap().unwrap();
    receiver.come_back_to_it().unwrap();
    drop(server);
    let mut server = serve("must", two(), &sources[1]);
    let end = Instant::now() + Duration::from_secs(20);
    let error = loop {
        server.dispatch().unwrap();
        match receiver.try_next(Ready::FRAME) {
            Ok(_) => thread::sleep(Duration::from_millis(1)),
            Err(error) => break error,
        }
        assert!(Instant::now() < end, "it waits for ever");
    };
    assert!(error.kind() == Kind::Permission && error.line().contains("--writable"), "{error:?}");
}
