use super::*;
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::AtomicBool;
use loom::thread;

/// A buffer, filled by the camera and read by a consumer. Loom reports an access that is not ordered against the others.
struct Buffer(UnsafeCell<u64>);
// SAFETY: for loom's checked cell only, which is what the models are about.
unsafe impl Sync for Buffer {}

#[test]
fn loom_a_buffer_is_not_filled_while_it_is_read() {
    loom::model(|| {
        let area = Arc::new(Area::new());
        let buffers = Arc::new([Buffer(UnsafeCell::new(0)), Buffer(UnsafeCell::new(0))]);
        let mut server = Server::new(Arc::clone(&area), 1);
        let other = Arc::clone(&buffers);
        let reader = thread::spawn(move || {
            let mut consumer = Consumer::new(area);
            for _ in 0..2 {
                let Some(taken) = consumer.take() else { continue };
                let number = taken.words[0];
                // SAFETY: a read that loom checks.
                other[(number % 2) as usize].0.with(|byte| assert_eq!(unsafe { *byte }, number));
                consumer.release(taken.position).unwrap();
            }
        });
        // The camera fills a buffer that nobody has a lease of.
        for number in 1..=3u64 {
            let place = (number % 2) as usize;
            server.collect().unwrap();
            if server.leases().any(|&held| held == place) {
                continue;
            }
            // SAFETY: a write that loom checks.
            buffers[place].0.with_mut(|byte| unsafe { *byte = number });
            server.publish(|_| [number; WORDS], place).unwrap();
        }
        reader.join().unwrap();
    });
}

#[test]
fn loom_no_wake_is_lost() {
    loom::model(|| {
        let area = Arc::new(Area::new());
        let bell = Arc::new(AtomicBool::new(false));
        let mut server = Server::new(Arc::clone(&area), 1);
        let rung = Arc::clone(&bell);
        let sleeper = thread::spawn(move || {
            let mut consumer = Consumer::new(area);
            match consumer.take() {
                Some(_) => (true, consumer),
                None => (!consumer.sleep(), consumer),
            }
        });
        if server.publish(|_| [1; WORDS], ()).unwrap().wake {
            rung.store(true, Ordering::Relaxed);
        }
        let (awake, mut consumer) = sleeper.join().unwrap();
        assert!(awake || bell.load(Ordering::Relaxed), "it sleeps and nobody rings");
        if !awake {
            assert!(consumer.take().is_some());
        }
    });
}

#[test]
fn loom_a_lease_ends_once() {
    loom::model(|| {
        let area = Arc::new(Area::new());
        let mut server = Server::new(Arc::clone(&area), 1);
        server.publish(|_| [7; WORDS], ()).unwrap();
        let other = thread::spawn(move || {
            let mut consumer = Consumer::new(area);
            let first = consumer.take();
            first.map(|taken| (taken.position, consumer.release(taken.position).is_ok()))
        });
        let revoked = server.take_back(|()| true).unwrap().revoked > 0;
        server.publish(|_| [8; WORDS], ()).unwrap();
        let released = other.join().unwrap();
        // What was released was not revoked. (One that is revoked while it is being taken is never seen.)
        assert!(!revoked || released != Some((1, true)));
    });
}

/// The words of a frame that is taken back, and of the one that comes into its entry after it, are never mixed.
#[test]
fn loom_words_are_those_of_their_frame() {
    loom::model(|| {
        let area = Arc::new(Area::new());
        let mut server = Server::new(Arc::clone(&area), 2);
        // The next entry is that of the first frame: the second is gone, and the third is in the entry after it.
        for position in 1..=3u64 {
            server.publish(|_| [position + 6; WORDS], position).unwrap();
            server.skip(|&other| other == 2).unwrap();
        }
        let other = thread::spawn(move || {
            let taken = Consumer::new(area).take();
            taken.inspect(|taken| assert_eq!(taken.words, [taken.position + 6; WORDS]))
        });
        server.take_back(|&position| position == 1).unwrap();
        server.publish(|_| [4 + 6; WORDS], 4).unwrap();
        assert_eq!(server.next, 5, "it has used the entry again");
        other.join().unwrap();
    });
}

/// A frame that nobody seems to have is skipped; who takes it at that moment keeps it, or never had it.
#[test]
fn loom_who_has_just_taken_a_frame_keeps_it() {
    loom::model(|| {
        let area = Arc::new(Area::new());
        let mut server = Server::new(Arc::clone(&area), 1);
        server.publish(|_| [7; WORDS], ()).unwrap();
        let other = thread::spawn(move || {
            let mut consumer = Consumer::new(area);
            consumer.take().map(|taken| consumer.release(taken.position))
        });
        if !server.has_taken(|()| true) {
            server.skip(|()| true).unwrap();
        }
        assert!(matches!(other.join().unwrap(), None | Some(Ok(_))));
    });
}

#[test]
fn loom_a_fenced_frame_is_found_or_rung_for() {
    loom::model(|| {
        let area = Arc::new(Area::new());
        let mut server = Server::new(Arc::clone(&area), 1);
        server.publish(|_| [7; WORDS], ()).unwrap();
        let other = thread::spawn(move || {
            let mut consumer = Consumer::new(Arc::clone(&area));
            let taken = consumer.take().unwrap();
            area.release_fenced(taken.position).unwrap()
        });
        let asleep = server.sleep().unwrap();
        let found = server.has_fenced();
        let rung = other.join().unwrap();
        assert!(!asleep || found || rung, "the server sleeps, and nobody rings");
    });
}

/// The same without a fence: a server that waits for a release finds it, or is rung for.
#[test]
fn loom_a_release_is_found_or_rung_for() {
    loom::model(|| {
        let area = Arc::new(Area::new());
        let mut server = Server::new(Arc::clone(&area), 1);
        server.publish(|_| [7; WORDS], ()).unwrap();
        let other = thread::spawn(move || {
            let mut consumer = Consumer::new(Arc::clone(&area));
            let taken = consumer.take().unwrap();
            area.release(taken.position).unwrap()
        });
        let asleep = server.sleep().unwrap();
        let found = server.leases().next().is_none();
        let rung = other.join().unwrap();
        assert!(!asleep || found || rung, "the server sleeps, and nobody rings");
        assert_eq!(server.collect(), Ok(0), "what was released is not found");
    });
}

/// A buffer is filled again when its frame was taken back, while the consumer reads: who finds that it still had the frame after it has
/// read, has read the frame.
#[test]
fn loom_what_was_read_before_it_was_taken_back_is_the_frame() {
    loom::model(|| {
        let area = Arc::new(Area::new());
        // Not checked against the reader: that both are at it is what this is about.
        let buffer = Arc::new(AtomicU64::new(7));
        let mut server = Server::new(Arc::clone(&area), 1);
        server.publish(|_| [7; WORDS], ()).unwrap();
        let other = Arc::clone(&buffer);
        let reader = thread::spawn(move || {
            let mut consumer = Consumer::new(area);
            let taken = consumer.take()?;
            let read = other.load(Ordering::Relaxed);
            if consumer.holds(taken.position) {
                assert_eq!(read, 7, "it holds the frame, and has read another");
            }
            Some(read)
        });
        let taken_back = server.take_back(|()| true).unwrap();
        assert_eq!(taken_back.skipped + taken_back.revoked, 1);
        buffer.store(8, Ordering::Relaxed);
        reader.join().unwrap();
    });
}
