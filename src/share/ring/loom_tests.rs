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
            // The words of a frame that is taken back, and of the one that comes after it, are never mixed.
            let first = consumer.take();
            first.map(|taken| {
                assert_eq!(taken.words, [taken.position + 6; WORDS]);
                (taken.position, consumer.release(taken.position).is_ok())
            })
        });
        let revoked = server.take_back(|()| true).unwrap().revoked > 0;
        server.publish(|_| [8; WORDS], ()).unwrap();
        let released = other.join().unwrap();
        // What was released was not revoked. (One that is revoked while it is being taken is never seen.)
        assert!(!revoked || released != Some((1, true)));
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
