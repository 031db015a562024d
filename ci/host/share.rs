//! One source for many processes, with the test card: `dmaflow share` and its consumers, stopped, killed and in order.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dmaflow::endpoint::{Ready, Source};
use dmaflow::error::{Error, Kind};
use dmaflow::frame::Frame;
use dmaflow::pattern::{Pattern, PatternRequest};
use dmaflow::share::Receiver;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

mod c_program;
mod chaos;
mod process;
mod service;

use process::{At, Folder, PATIENCE, Process, output_of, socket_at};

/// Connects as soon as the server listens.
fn connect(at: &str) -> Receiver {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        match Receiver::connect(at, "test") {
            Ok(receiver) => return receiver,
            Err(error) if error.kind() == Kind::NotFound && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => panic!("{error:?}"),
        }
    }
}

fn next(receiver: &mut Receiver) -> Result<Frame, Error> {
    loop {
        if let Some(frame) = receiver.try_next(Ready::FRAME)? {
            return Ok(frame);
        }
        let mut fds = [PollFd::new(receiver.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, 20_000u16).unwrap(), 1, "it waits for ever");
    }
}

fn pixels(frame: &Frame) -> Vec<u8> {
    let layout = frame.buffer().layout();
    let mut bytes = vec![0; layout.memory_len(0)];
    frame.buffer().read().unwrap().memory(0).unwrap().read(0, &mut bytes);
    bytes
}

/// Writes a picture of 64x48 pixels in XR24.
fn fill(frame: &Frame, bytes: &[u8]) {
    let mut writer = frame.buffer().write().unwrap();
    assert_eq!(bytes.len(), 48 * 64 * 4);
    (0..).zip(bytes.chunks(64 * 4)).for_each(|(y, row)| writer.row(0, y, row));
    writer.end().unwrap();
}

/// The first frames of the test card, by their sequence numbers: all of them, though a busy machine leaves some out each time.
fn expected(count: u32) -> HashMap<u32, Vec<u8>> {
    let request = PatternRequest { rate: 1000.0, size: (64, 48), ..PatternRequest::default() };
    let mut frames = HashMap::new();
    while !(0..count).all(|sequence| frames.contains_key(&sequence)) {
        let mut source = Pattern::new(&request).unwrap();
        source.start().unwrap();
        let mut last = 0;
        while last < count {
            let Some(frame) = source.try_next(Ready::FRAME).unwrap() else { continue };
            last = frame.meta().sequence;
            frames.entry(last).or_insert_with(|| pixels(&frame));
            drop(frame);
            source.recycle().unwrap();
        }
    }
    frames
}

/// The report of a consumer that has taken so many frames, two at a time at most: of those it took last the server may not know.
fn assert_told_latency(consumer: &serde_json::Value, frames: u64) {
    let [p50, p99, max, measured] =
        ["p50", "p99", "max", "measured"].map(|name| consumer["latency_us"][name].as_u64().unwrap());
    assert!(p50 <= p99 && p99 <= max && (frames - 2..=128).contains(&measured), "{consumer}");
    // It was waiting: no frame was there for as long as a lease, but where this machine is slow.
    assert!(p50 < 5_000_000, "{consumer}");
}

#[test]
fn consumers_see_each_frame_as_it_was_drawn() {
    let at = socket_at("frames");
    let server = Process::start(&format!("share --from pattern --size 64x48 --fps 25 --at {at} --json"));
    let mut receiver = connect(&at);
    let other = Process::start(&format!("pipe --from unix:{at} --to null --frames 20 --json"));
    let expected = expected(400);
    let mut compared = 0;
    for _ in 0..20 {
        let frame = next(&mut receiver).unwrap();
        if let Some(bytes) = expected.get(&frame.meta().sequence) {
            assert!(*bytes == pixels(&frame) && receiver.holds(&frame), "{:?}", frame.meta());
            compared += 1;
        }
    }
    assert!(compared > 0);
    let other = other.json();
    assert_eq!(
        (&other["path"], &other["bytes_copied"], &other["frames"]["captured"]),
        (&"exported".into(), &0.into(), &20.into())
    );
    server.signal(Signal::SIGINT);
    let end = loop {
        if let Err(error) = next(&mut receiver) {
            break error;
        }
    };
    assert_eq!(end.kind(), Kind::Ended);
    let report = server.json();
    assert_eq!((&report["bytes_copied"], &report["consumers"][0]["name"]), (&0.into(), &"test".into()));
    assert_eq!(report["gone"][0]["disconnected"], serde_json::Value::Null);
    for consumer in [&report["consumers"][0], &report["gone"][0]] {
        assert_told_latency(consumer, 20);
    }
    assert!(!PathBuf::from(&*at).exists());
}

#[test]
fn who_is_stopped_or_killed_hurts_nobody_else() {
    let at = socket_at("stopped");
    let server = Process::start(&format!("share --from pattern --size 64x48 --fps 10 --at {at} --json"));
    let mut receiver = connect(&at);
    let other = Process::start(&format!("pipe --from unix:{at} --to null"));
    let start = Instant::now();
    let (mut stopped, mut killed) = (false, false);
    while start.elapsed() < Duration::from_secs(3) {
        drop(next(&mut receiver).unwrap());
        if !stopped && start.elapsed() > Duration::from_millis(800) {
            other.signal(Signal::SIGSTOP);
            stopped = true;
        }
        if !killed && start.elapsed() > Duration::from_millis(2200) {
            other.signal(Signal::SIGKILL);
            killed = true;
        }
    }
    let counts = receiver.counts();
    assert_eq!((counts.dropped, counts.skipped, receiver.revoked()), (0, 0, 0));
    server.signal(Signal::SIGINT);
    let report = server.json();
    assert_eq!(
        (&report["frames"]["dropped_by_camera"], &report["consumers"].as_array().unwrap().len()),
        (&0.into(), &1)
    );
    assert_eq!(report["gone"][0]["name"], "dmaflow");
    assert!(report["gone"][0]["skipped"].as_u64().unwrap() > 0, "{report}");
}

#[test]
fn a_server_that_is_killed_ends_the_stream_and_what_is_held_stays() {
    let at = socket_at("killed");
    let server = Process::start(&format!("share --from pattern --size 64x48 --fps 50 --at {at}"));
    let mut receiver = connect(&at);
    let frame = next(&mut receiver).unwrap();
    let shown = pixels(&frame);
    server.signal(Signal::SIGKILL);
    server.finish();
    let error = loop {
        if let Err(error) = next(&mut receiver) {
            break error;
        }
    };
    assert!(error.kind() == Kind::Disconnected && error.line().contains("its server is gone"), "{error:?}");
    assert!(pixels(&frame) == shown && receiver.holds(&frame));
    // Its file stayed, and is replaced.
    assert!(PathBuf::from(&*at).exists());
    let server = Process::start(&format!("share --from pattern --fps 50 --at {at} --json"));
    drop(next(&mut connect(&at)).unwrap());
    // A live one is not.
    let second = Process::start(&format!("share --from pattern --at {at}")).finish();
    assert!(second.status.code() == Some(1) && String::from_utf8_lossy(&second.stderr).contains("another server"));
    server.signal(Signal::SIGINT);
    server.json();
}

/// What a program is too late for is skipped, and none of it is a loss of its source's.
#[test]
fn who_is_late_is_told_what_it_skipped() {
    let at = socket_at("late");
    let server = Process::start(&format!("share --from pattern --size 64x48 --fps 25 --at {at} --json"));
    let mut receiver = connect(&at);
    let pipe = |options: &str| Process::start(&format!("pipe --from unix:{at} --to null --frames 60 {options}"));
    let pipes = [pipe("--json"), pipe("")];
    for _ in 0..4 {
        std::thread::sleep(Duration::from_millis(300));
        drop(next(&mut receiver).unwrap());
        pipes.iter().for_each(|pipe| pipe.signal(Signal::SIGSTOP));
        std::thread::sleep(Duration::from_millis(500));
        pipes.iter().for_each(|pipe| pipe.signal(Signal::SIGCONT));
    }
    let [told, table] = pipes;
    let (told, table) = (told.json(), table.finish());
    let table = format!("{}{}", String::from_utf8_lossy(&table.stdout), String::from_utf8_lossy(&table.stderr));
    drop(next(&mut receiver).unwrap());
    server.signal(Signal::SIGINT);
    let report = server.json();
    // A machine that is busy leaves frames out itself.
    let lost = report["frames"]["dropped_by_camera"].as_u64().unwrap();
    let counts = receiver.counts();
    assert!(
        counts.skipped > 10 && counts.skipped == receiver.skipped() && counts.dropped <= lost,
        "{counts:?}, {report}"
    );
    let [skipped, dropped] = ["skipped", "dropped_by_camera"].map(|name| told["frames"][name].as_u64().unwrap());
    assert!(skipped > 10 && dropped <= lost && told["frames"]["captured"] == 60, "{told}, {report}");
    assert!(table.contains(" skipped for being late, 0 by the display"), "{table}");
}

/// Frames that are on their way when the server is killed are in the ring: they come first, in order, and whole; then an error says that it is
/// gone, and goes on to say so.
#[test]
fn what_a_killed_server_has_given_comes_before_the_error() {
    let at = socket_at("given");
    let options = "--from pattern --size 64x48 --fps 25 --budget 4";
    let server = Process::start(&format!("share {options} --at {at}"));
    let (mut late, mut clock) = (connect(&at), connect(&at));
    let expected = expected(400);
    let first = next(&mut late).unwrap().meta().sequence;
    late.recycle().unwrap();
    // The last of these may not be in the other's ring yet: that is served by itself.
    let mut given = Vec::new();
    while given.len() < 5 {
        let sequence = next(&mut clock).unwrap().meta().sequence;
        given.extend(Some(sequence).filter(|&sequence| sequence > first));
    }
    server.signal(Signal::SIGKILL);
    server.finish();
    let (mut came, mut compared) = (Vec::new(), 0);
    let error = loop {
        match next(&mut late) {
            Ok(frame) => {
                let sequence = frame.meta().sequence;
                assert!(late.holds(&frame), "{sequence}");
                if let Some(bytes) = expected.get(&sequence) {
                    assert!(*bytes == pixels(&frame), "{sequence}");
                    compared += 1;
                }
                came.push(sequence);
            }
            Err(error) => break error,
        }
    };
    // Its budget of the newest, all of those or but for the last; and what came between the other's last look and the end.
    assert!(came.len() == 4 && came.is_sorted() && compared > 0, "{came:?} came of {given:?}");
    assert!(came.last() >= given.iter().rev().nth(1), "{came:?} came of {given:?}");
    assert!(error.kind() == Kind::Disconnected && error.line().contains("its server is gone"), "{error:?}");
    assert_eq!(late.try_next(Ready::FRAME).unwrap_err().kind(), Kind::Disconnected);
}

/// A consumer that is to come back does so, whether its server was killed or ended in order, and whatever the next one shares.
#[test]
fn consumers_come_back_to_the_next_server() {
    let at = socket_at("again");
    let serve = |size: &str| Process::start(&format!("share --from pattern --size {size} --fps 50 --at {at} --json"));
    let server = serve("64x48");
    let mut receiver = connect(&at);
    receiver.come_back_to_it().unwrap();
    let consumer = Process::start(&format!("pipe --from unix:{at} --to null --reconnect --frames 100 --json"));
    let kept = next(&mut receiver).unwrap();
    let shown = pixels(&kept);
    // Both are served.
    for _ in 0..20 {
        next(&mut receiver).unwrap();
    }
    server.signal(Signal::SIGKILL);
    server.finish();
    for (round, size) in [(1, "128x96"), (2, "64x48")] {
        // It waits for longer than the server's watchdog says, where nobody is.
        let away = Instant::now() + Duration::from_millis(300);
        while Instant::now() < away {
            // None, but for those that are in the ring still.
            drop(receiver.try_next(Ready::FRAME).unwrap());
            std::thread::sleep(Duration::from_millis(10));
        }
        let server = serve(size);
        assert_eq!(next(&mut receiver).unwrap_err().kind(), Kind::FormatChanged, "before any frame of it");
        assert_eq!(receiver.try_next(Ready::FRAME).unwrap_err().kind(), Kind::FormatChanged);
        receiver.follow().unwrap();
        assert_eq!(receiver.layout().size(), if size == "64x48" { (64, 48) } else { (128, 96) });
        for _ in 0..30 {
            let frame = next(&mut receiver).unwrap();
            assert!(receiver.holds(&frame));
        }
        assert!(pixels(&kept) == shown, "what is held of the first server stays");
        if round == 1 {
            server.signal(Signal::SIGINT);
            server.finish();
            while let Ok(Some(_)) = receiver.try_next(Ready::FRAME) {}
        } else {
            let report = consumer.json();
            assert_eq!((&report["frames"]["captured"], &report["bytes_copied"]), (&100.into(), &0.into()));
            server.signal(Signal::SIGINT);
            server.json();
            break;
        }
    }
    assert_eq!((receiver.revoked(), receiver.skipped()), (0, 0));
}

/// Frames that are pushed into a share are its source's own. What is shared is not shared on, but copied on.
#[test]
fn frames_are_pushed_and_copied_on_and_not_shared_on() {
    let (at, on) = (socket_at("pushed"), socket_at("on"));
    let first =
        Process::start(&format!("pipe --from pattern --size 64x48 --fps 25 --frames 150 --to unix:{at} --json"));
    drop(connect(&at));
    let refused = Process::start(&format!("share --from unix:{at} --at {on}")).finish();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(said.contains("cannot be shared on") && said.contains(&format!("connect to unix:{at} itself")), "{said}");
    assert!(!PathBuf::from(&*on).exists());
    let line = format!("pipe --from unix:{at} --to unix:{on} --json");
    let refused = Process::start(&format!("{line} --path zero-copy")).finish();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(3), "{said}");
    assert!(said.contains("another server's") && said.contains("connect to the first server itself"), "{said}");
    let second = Process::start(&line);
    let mut receiver = connect(&on);
    assert_eq!(receiver.source(), format!("unix:{at}"));
    let (mut frames, mut compared, expected) = (0, 0, expected(200));
    let end = loop {
        match next(&mut receiver) {
            Ok(frame) => {
                frames += 1;
                if let Some(bytes) = expected.get(&frame.meta().sequence) {
                    assert!(*bytes == pixels(&frame) && receiver.holds(&frame), "{:?}", frame.meta());
                    compared += 1;
                }
            }
            Err(error) => break error,
        }
    };
    assert!(frames > 10 && compared > 10 && end.kind() == Kind::Ended, "{frames} frames, then {end:?}");
    let report = first.json();
    assert_eq!((&report["frames"]["captured"], &report["bytes_copied"]), (&150.into(), &0.into()));
    let report = second.json();
    assert_eq!(report["path"], "copied", "{report}");
    let copied = report["frames"]["presented"].as_u64().unwrap();
    assert!(copied >= frames, "{report}");
    assert!(report["bytes_copied"].as_u64().unwrap() >= copied * 64 * 48 * 4, "{report}");
    assert!(report["refusals"][0]["why"].as_str().unwrap().contains("another server's"), "{report}");
}

/// Ten thousand connections, opened and dropped before, amid and after the hello, leave nothing.
#[test]
fn connections_that_are_dropped_leave_nothing() {
    use nix::sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect as connect_to, send, socket,
    };
    use std::os::fd::AsRawFd;

    let at = socket_at("dropped");
    let server = Process::start(&format!("share --from pattern --size 64x48 --fps 20 --at {at} --json"));
    let mut receiver = connect(&at);
    next(&mut receiver).unwrap();
    let pid = Pid::from_raw(server.0.as_ref().unwrap().id().cast_signed());
    let held = || chaos::Held::of(pid).unwrap();
    let memory = || chaos::memory(pid).unwrap();
    let (before, mut memory_before) = (held(), 0);
    let address = UnixAddr::new(&*at).unwrap();
    let mut refused = 0;
    for number in 0..10_000 {
        if number == 1000 {
            // What it takes once, it has by now.
            memory_before = memory();
        }
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        // The queue of those who wait to be let in may be full for a moment: then this waits.
        connect_to(fd.as_raw_fd(), &address).unwrap();
        let hello = b"dmaf\x01\0\x01\0\0\0\0\0\x01\0x";
        let bytes: &[u8] = match number % 3 {
            0 => continue,
            1 => &hello[..],
            _ => &hello[..number % 16],
        };
        refused += u32::from(send(fd.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL).is_err());
    }
    let end = Instant::now() + Duration::from_secs(30);
    while held() != before && Instant::now() < end {
        drop(next(&mut receiver).unwrap());
    }
    assert_eq!(held(), before, "{refused} were refused");
    // Of 9,000 connections, less than 30 bytes each.
    let memory_after = memory();
    println!("{before:?}; {memory_before} KiB, then {memory_after}");
    assert!(memory_after <= memory_before + chaos::MORE_KIB, "{memory_before} KiB, then {memory_after}");
    server.signal(Signal::SIGINT);
    assert_eq!(server.json()["consumers"].as_array().unwrap().len(), 1);
}

/// That consumers may keep the source waiting without doing anything wrong is said, once, and only where it is so.
#[test]
fn a_lease_that_may_starve_the_source_is_told() {
    for (lease, times) in [("60000", 1), ("40", 0)] {
        let at = socket_at(&format!("starve-{lease}"));
        let options = format!("--from pattern --size 64x48 --fps 25 --buffers 5 --lease {lease}");
        let server = Process::start(&format!("share {options} --at {at}"));
        let mut receivers = [(); 2].map(|()| connect(&at));
        for _ in 0..5 {
            drop(receivers.each_mut().map(|receiver| next(receiver).unwrap()));
        }
        server.signal(Signal::SIGINT);
        let output = server.finish();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(said.matches("2 consumers may keep frames for 60000 ms each").count(), times, "{said}");
    }
}

fn chaos(at: &At, rounds: u32) -> chaos::Chaos {
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_nanos() as u64
        | 1;
    chaos::Chaos {
        program: env!("CARGO_BIN_EXE_dmaflow").into(),
        source: "--from pattern --size 64x48 --fps 20".into(),
        at: at.to_string(),
        rounds,
        late: 0,
        seed,
    }
}

#[test]
fn consumers_in_chaos_hurt_nobody_else() {
    let at = socket_at("chaos");
    let told = chaos(&at, 60).of_consumers();
    println!("{}", told.unwrap_or_else(|error| panic!("{error:?}")));
}

#[test]
fn consumers_come_back_through_chaos() {
    let at = socket_at("servers");
    let told = chaos(&at, 12).of_servers();
    println!("{}", told.unwrap_or_else(|error| panic!("{error:?}")));
}

#[test]
fn what_is_shared_has_one_shape() {
    let at = socket_at("shape");
    let _server = Process::start(&format!("share --from pattern --size 64x48 --fps 25 --at {at}"));
    drop(connect(&at));
    for (options, status) in [
        ("--size 64x48 --format XR24", 0),
        ("--size 128x96", 1),
        ("--format NV12", 1),
        ("--fps 10", 2),
        ("--buffers 8", 2),
        ("--reconnect", 0),
    ] {
        let run = Process::start(&format!("pipe --from unix:{at} --to null --frames 2 {options}")).finish();
        let said = String::from_utf8_lossy(&run.stderr);
        assert_eq!(run.status.code(), Some(status), "{options}: {said}");
        // Who wants another shape is told which one is shared.
        assert!(status != 1 || (said.contains("64x48") && said.contains("XR24")), "{options}: {said}");
    }
    for line in [
        "pipe --from pattern --to null --reconnect",
        "share --from pattern",
        "share --from pattern --at x --mode 8",
        "pipe --from unix: --to null",
    ] {
        assert_eq!(Process::start(line).finish().status.code(), Some(2), "{line}");
    }
}
