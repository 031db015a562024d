//! Frames that are taken back: whose may be, and what becomes of those who have them.

use super::*;
use crate::endpoint::{JoinError, Rung, Shown};
use crate::format::{Format, Layout};
use crate::frame::Buffer;
use crate::ladder::Path;
use crate::pipe::{Limits, Pipe};
use crate::sink::Raw;
use std::sync::atomic::{AtomicBool, Ordering};

/// Serves the pattern with so many buffers in a thread of its own, until it is told to stop; tells how many frames were stolen.
fn serving<T>(test: &str, request: ServerRequest, buffers: u32, consume: impl FnOnce(Receiver) -> T) -> (T, u64) {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let server = scope.spawn(|| {
            let mut source = pattern(1000.0, buffers);
            let mut server = serve(test, request, &source);
            source.start().unwrap();
            let mut stolen = 0;
            while !done.load(Ordering::Relaxed) {
                source.recycle().unwrap();
                if let Some(frame) = source.try_next(Ready::FRAME).unwrap() {
                    server.present(frame).unwrap();
                }
                server.dispatch().unwrap();
                stolen = server.consumers().first().map_or(stolen, |info| info.stolen);
            }
            stolen
        });
        let end = Instant::now() + Duration::from_secs(20);
        let receiver = loop {
            match Receiver::connect(&name(test), "tester") {
                Err(error) if error.kind() == Kind::NotFound && Instant::now() < end => thread::yield_now(),
                other => break other.unwrap(),
            }
        };
        let consumed = consume(receiver);
        done.store(true, Ordering::Relaxed);
        (consumed, server.join().unwrap())
    })
}

/// The source is short at every frame, and what nobody has taken goes first. Who takes it at that very moment keeps it for its lease.
#[test]
fn nobody_loses_a_frame_within_its_lease() {
    let request = ServerRequest { lease: Some(Duration::from_secs(60)), budget: 3, ..two() };
    let (taken, stolen) = serving("within", request, 4, |mut receiver| {
        let end = Instant::now() + Duration::from_millis(1500);
        let mut taken = 0;
        while Instant::now() < end {
            let Some(frame) = receiver.try_next(Ready::FRAME).unwrap() else { continue };
            // For as long as it takes to use it; the next is published meanwhile now and then.
            let until = Instant::now() + Duration::from_micros(taken % 7 * 500);
            while Instant::now() < until {
                assert!(receiver.holds(&frame), "frame {taken} was stolen");
            }
            assert!(receiver.holds(&frame), "frame {taken} was stolen");
            drop(frame);
            taken += 1;
        }
        taken
    });
    assert!(taken > 100, "{taken}");
    assert_eq!(stolen, 0);
}

/// Consumers that keep to a long lease can have all buffers; those of the usual one only where there are few.
#[test]
fn whether_consumers_may_starve_the_source_is_known() {
    let may = |lease: Option<u64>, buffers, consumers| {
        let source = pattern(100.0, buffers);
        let request = ServerRequest { lease: lease.map(Duration::from_millis), ..two() };
        let mut server = serve("starve", request, &source);
        let _receivers: Vec<_> = (0..consumers).map(|_| connect(&mut server, "starve").unwrap()).collect();
        server.may_starve()
    };
    // Three frame times: four frames at most are within their lease.
    assert_eq!([1, 2, 8].map(|consumers| may(None, 8, consumers)), [false; 3]);
    assert_eq!([1, 2].map(|consumers| may(None, 5, consumers)), [false, true]);
    assert_eq!([3, 4].map(|consumers| may(Some(1000), 8, consumers)), [false, true]);
    assert_eq!([1, 2].map(|consumers| may(Some(1000), 3, consumers)), [false, true]);
}

/// One that takes longer for a frame than it may keep it.
struct Slow;

impl Sink for Slow {
    fn name(&self) -> &str {
        "slow"
    }

    fn formats(&self) -> Option<Vec<Format>> {
        None
    }

    fn join(&mut self, _: &Layout, _: Option<f64>, _: &[Buffer]) -> Result<Rung, JoinError> {
        Ok(Rung::Exported)
    }

    fn present(&mut self, frame: Frame) -> crate::Result<Option<Shown>> {
        thread::sleep(Duration::from_millis(if frame.meta().sequence.is_multiple_of(2) { 50 } else { 0 }));
        frame.check()?;
        Ok(Some(Shown { meta: *frame.meta(), at_us: crate::clock::now_us() }))
    }
}

/// A flow goes on without the frames that were taken back from it, and says how many they were.
#[test]
fn a_flow_goes_on_without_a_frame_that_was_taken_back() {
    let request = ServerRequest { lease: Some(Duration::from_millis(1)), ..two() };
    let (account, stolen) = serving("flow", request, 2, |mut receiver| {
        let limits = Limits { frames: Some(20), duration: None };
        let mut slow = Slow;
        let pipe = Pipe::join(&mut receiver, &mut slow, Path::ZeroCopy, limits);
        pipe.map_err(|_| "it was refused").unwrap().run(None, &mut |_| {}).unwrap()
    });
    assert!(account.dropped_by_sink > 0 && stolen > 0, "{}, {stolen} stolen", account.dropped_by_sink);
    assert_eq!((account.captured, account.presented + account.dropped_by_sink), (20, 20));
    assert!(account.moves[0].why.contains("taken back"), "{:?}", account.moves);
}

/// Nothing of a frame that is another's goes into a stream, and the stream goes on with the next.
#[test]
fn a_stream_goes_on_without_a_frame_that_was_taken_back() {
    let path = std::env::temp_dir().join(format!("dmaflow-taken-back-{}.raw", std::process::id()));
    let mut source = pattern(200.0, 4);
    let mut server = serve("stream", two(), &source);
    let mut receiver = connect(&mut server, "stream").unwrap();
    source.start().unwrap();
    let mut raw = Raw::new(&path);
    raw.join(receiver.layout(), None, receiver.buffers()).unwrap();
    let mut sent = Vec::new();
    for number in 0..3 {
        drop(present(&mut source, &mut server));
        let frame = receiver.try_next(Ready::FRAME).unwrap().unwrap();
        if number == 1 {
            server.consumers[0].take_back(|_| true, true).unwrap();
            assert_eq!(raw.present(frame).unwrap_err().kind(), Kind::Revoked);
        } else {
            sent.extend(pixels(&frame));
            assert!(raw.present(frame).unwrap().is_some());
        }
        receiver.recycle().unwrap();
    }
    assert!(std::fs::read(&path).unwrap() == sent);
    std::fs::remove_file(path).unwrap();
}
