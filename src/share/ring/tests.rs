use super::take_back::TakenBack;
use super::*;
use proptest::prelude::*;
use std::rc::Rc;

type Ends = (Server<Rc<Area>, u64>, Consumer<Rc<Area>>, Rc<Area>);

fn ends(budget: usize) -> Ends {
    let area = Rc::new(Area::new());
    (Server::new(Rc::clone(&area), budget), Consumer::new(Rc::clone(&area)), area)
}

fn words(number: u64) -> [u64; WORDS] {
    std::array::from_fn(|i| number * 10 + i as u64)
}

#[test]
fn the_layout_is_the_documented_one() {
    assert_eq!(size_of::<Area>(), 64 * (3 + ENTRIES));
    assert_eq!((align_of::<Area>(), size_of::<Entry>()), (64, 64));
    assert_eq!(std::mem::offset_of!(Area, consumer), 64);
    assert_eq!(std::mem::offset_of!(ConsumerLine, delays), 8);
    assert_eq!(std::mem::offset_of!(Area, server_sleeps), 128);
    assert_eq!(std::mem::offset_of!(Area, entries), 192);
}

#[test]
fn frames_come_in_order_and_the_oldest_is_skipped_for_a_new_one() {
    let (mut server, mut consumer, _area) = ends(2);
    assert_eq!(consumer.take(), None);
    for number in 1..=4 {
        let published = server.publish(|_| words(number), number).unwrap();
        assert_eq!(published.skipped, u32::from(number > 2), "{number}");
    }
    assert_eq!(server.leases().copied().min(), Some(3), "1 and 2 were given up");
    let third = consumer.take().unwrap();
    assert_eq!(third.words, words(3));
    let fourth = consumer.take().unwrap();
    assert_eq!((fourth.words, consumer.take()), (words(4), None));
    // It holds all that it may: nothing can be skipped for the next but that one itself.
    let published = server.publish(|_| words(5), 5).unwrap();
    assert_eq!((published.skipped, consumer.take()), (1, None));
    assert_eq!(consumer.release(third.position), Ok(false));
    assert_eq!(consumer.release(third.position), Err(Revoked), "once is enough");
    assert_eq!(server.publish(|_| words(6), 6).unwrap().skipped, 0);
    assert_eq!(consumer.take().unwrap().words, words(6));
}

#[test]
fn a_frame_that_is_kept_stops_no_other() {
    let (mut server, mut consumer, _area) = ends(2);
    server.publish(|_| words(0), 0).unwrap();
    let kept = consumer.take().unwrap();
    for number in 1..100 {
        assert_eq!(server.publish(|_| words(number), number).unwrap().skipped, 0, "{number}");
        let taken = consumer.take().unwrap();
        assert_eq!(taken.words, words(number));
        consumer.release(taken.position).unwrap();
    }
    assert!(consumer.holds(kept.position));
    assert_eq!(consumer.release(kept.position), Ok(false));
    assert_eq!(server.collect(), Ok(0));
}

#[test]
fn what_is_taken_back_is_told() {
    let (mut server, mut consumer, _area) = ends(2);
    for number in 1..=2 {
        server.publish(|_| words(number), number).unwrap();
    }
    assert!(!server.has_taken(|_| true));
    let (first, second) = (consumer.take().unwrap(), consumer.take().unwrap());
    assert!(server.has_taken(|&number| number == 1) && !server.has_taken(|&number| number == 3));
    assert_eq!(server.take_back(|&number| number == 1), Ok(TakenBack { revoked: 1, skipped: 0 }));
    assert!(!consumer.holds(first.position) && consumer.holds(second.position));
    assert_eq!(server.leases().copied().collect::<Vec<_>>(), [2]);
    assert_eq!(consumer.release(first.position), Err(Revoked));
    assert_eq!(consumer.release(second.position), Ok(false));
    server.publish(|_| words(3), 3).unwrap();
    assert_eq!(server.take_back(|_| true), Ok(TakenBack { revoked: 0, skipped: 1 }));
    assert_eq!((consumer.take(), server.leases().count()), (None, 0));
}

/// Whoever has a frame in hand keeps it where only those that nobody took are wanted.
#[test]
fn what_was_taken_is_not_skipped() {
    let (mut server, mut consumer, _area) = ends(2);
    for number in 1..=2 {
        server.publish(|_| words(number), number).unwrap();
    }
    let taken = consumer.take().unwrap();
    assert_eq!(server.skip(|_| true), Ok(TakenBack { revoked: 0, skipped: 1 }));
    assert!(consumer.holds(taken.position) && consumer.take().is_none());
    assert_eq!(server.leases().copied().collect::<Vec<_>>(), [1]);
    assert_eq!(consumer.release(taken.position), Ok(false));
    assert_eq!(server.skip(|_| true), Ok(TakenBack::default()));
    assert_eq!(server.leases().count(), 0);
}

/// One broken entry does not leave the others to who may still read them.
#[test]
fn from_who_is_broken_everything_is_taken_back() {
    let (mut server, mut consumer, area) = ends(3);
    for number in 1..=3 {
        server.publish(|_| words(number), number).unwrap();
    }
    let taken = [(); 2].map(|()| consumer.take().unwrap());
    area.entries[1].state.store(u64::MAX, Ordering::Relaxed);
    assert!(server.take_back(|_| true).is_err());
    assert_eq!(server.take_all_back(), TakenBack { revoked: 2, skipped: 1 });
    assert!(!taken.iter().any(|taken| consumer.holds(taken.position)));
    let states = [1, 2, 3].map(|place| area.entries[place].state.load(Ordering::Relaxed));
    assert_eq!(states, [word(1, Stage::Revoked), word(2, Stage::Revoked), word(3, Stage::Skipped)]);
    assert_eq!((server.leases().count(), consumer.take()), (0, None));
}

/// What is given back behind a fence is the consumer's until the server finds that the fence has signalled, or takes it back.
#[test]
fn what_is_given_back_behind_a_fence_is_held_until_it_is_given_up() {
    let (mut server, mut consumer, area) = ends(2);
    let looked_at = |server: &mut Server<Rc<Area>, u64>, keep: bool| {
        let mut seen = Vec::new();
        server.fenced_without(|_| false).into_iter().for_each(|position| {
            seen.push((position, *server.lease_mut(position).unwrap()));
        });
        server.keep_fenced(|_| keep);
        seen
    };
    for number in 1..=2 {
        server.publish(|_| words(number), number).unwrap();
    }
    let (first, second) = (consumer.take().unwrap(), consumer.take().unwrap());
    assert_eq!((server.sleep(), server.has_fenced()), (Ok(true), false));
    assert_eq!(area.release_fenced(first.position), Ok(true), "the bell is to be rung");
    assert_eq!(area.release_fenced(first.position), Err(Revoked), "once is enough");
    assert!(!consumer.holds(first.position) && server.has_taken(|&number| number == 1));
    assert_eq!((server.sleep(), server.sleep()), (Ok(false), Ok(true)), "one has come; then none");
    assert_eq!((server.has_fenced(), server.collect()), (true, Ok(2)));
    assert_eq!(server.publish(|_| words(3), 3).unwrap().skipped, 1, "it counts");
    assert_eq!((looked_at(&mut server, true), looked_at(&mut server, false)), (vec![(1, 1)], vec![(1, 1)]));
    assert_eq!((looked_at(&mut server, true), server.collect(), server.has_fenced()), (vec![], Ok(1), false));
    assert!(!server.is_out(first.position) && server.is_out(second.position));
    // It is taken back as any other, and what comes in its place is another.
    assert_eq!(area.release_fenced(second.position), Ok(true));
    assert_eq!(server.skip_untaken(), Ok(0));
    assert_eq!(server.take_back(|&number| number == 2), Ok(TakenBack { revoked: 1, skipped: 0 }));
    for number in 3..40 {
        server.publish(|_| words(number), number).unwrap();
        assert!(looked_at(&mut server, false).is_empty(), "{number}");
    }
    assert_eq!((server.skip_untaken(), server.collect()), (Ok(2), Ok(0)));
}

#[test]
fn the_words_are_told_what_was_skipped() {
    let (mut server, mut consumer, _area) = ends(1);
    for number in 1..=3 {
        server.publish(|skipped| [u64::from(skipped); WORDS], number).unwrap();
    }
    assert_eq!(consumer.take().unwrap().words, [1; WORDS]);
}

#[test]
fn a_bell_is_rung_for_a_sleeper_alone() {
    let (mut server, mut consumer, _area) = ends(2);
    assert!(!server.publish(|_| words(1), 1).unwrap().wake);
    assert!(!consumer.sleep(), "a frame is there");
    let taken = consumer.take().unwrap();
    assert!(consumer.sleep());
    assert!(server.publish(|_| words(2), 2).unwrap().wake);
    assert!(!server.publish(|_| words(3), 3).unwrap().wake, "it was rung already");
    assert_eq!(server.sleep(), Ok(true));
    assert_eq!(consumer.release(taken.position), Ok(true));
    assert_eq!(server.collect(), Ok(1));
}

#[test]
fn delays_are_told_of_every_frame_once() {
    let (mut server, mut consumer, area) = ends(2);
    let delays = |frames, sum_us| Delays { frames, sum_us };
    assert_eq!(server.delays(), delays(0, 0));
    consumer.tell_delay(70);
    // As documented.
    assert_eq!(area.consumer.delays.load(Ordering::Relaxed), 1 << 40 | 70);
    assert_eq!((server.delays(), server.delays()), (delays(1, 70), delays(0, 0)));
    [70, 0, 30].into_iter().for_each(|us| consumer.tell_delay(us));
    assert_eq!(server.delays(), delays(3, 100));
    // Either half wraps, and the other is as it was.
    consumer.tell_delay((1 << 40) - 1);
    assert_eq!(server.delays(), delays(1, (1 << 40) - 1));
    consumer.delays.frames = (1 << 24) - 1;
    consumer.tell_delay(0);
    server.delays();
    consumer.tell_delay(5);
    assert_eq!(server.delays(), delays(1, 5));
}

proptest! {
    /// Whatever a server writes into the area, a consumer takes no more than there are entries, each of them once, and goes on.
    #[test]
    fn a_server_that_writes_anything(
        steps in prop::collection::vec((0u8..5, 0usize..ENTRIES, prop_oneof![any::<u64>(), 0u64..400, Just(u64::MAX)]), 1..200)
    ) {
        let (_, mut consumer, area) = ends(3);
        for (step, place, value) in steps {
            match step {
                0 => {
                    let taken: Vec<_> = std::iter::from_fn(|| consumer.take()).map(|taken| taken.position).collect();
                    prop_assert!(taken.len() <= ENTRIES && taken.is_sorted_by(|a, b| a < b), "{taken:?}");
                    for position in taken {
                        prop_assert!(consumer.holds(position));
                        let _ = consumer.release(position);
                        prop_assert_eq!(consumer.release(position), Err(Revoked));
                    }
                }
                1 => area.head.0.store(value, Ordering::Relaxed),
                2 => area.entries[place].state.store(word(value, Stage::Published), Ordering::Relaxed),
                3 => area.entries[place].state.store(value, Ordering::Relaxed),
                _ => { consumer.sleep(); }
            }
        }
    }

    /// Whatever a consumer writes into the area, the server goes on or says that it is broken, and never gives up a lease of which
    /// the area does not say so.
    #[test]
    fn a_consumer_that_writes_anything(
        steps in prop::collection::vec((0u8..9, 0usize..ENTRIES, prop_oneof![any::<u64>(), 0u64..400]), 1..200)
    ) {
        let (mut server, mut consumer, area) = ends(3);
        let mut number = 0;
        for (step, place, value) in steps {
            let result = match step {
                0 | 1 => {
                    number += 1;
                    server.publish(|_| words(number), number).map(drop)
                }
                2 => server.take_back(|&number| number % 2 == value % 2).map(drop),
                3 => { consumer.take(); Ok(()) }
                4 => { let _ = consumer.release(value); Ok(()) }
                5 => { let _ = area.release_fenced(value); Ok(()) }
                6 => {
                    server.keep_fenced(|&number| number % 2 == value % 2);
                    Ok(())
                }
                7 => server.skip_untaken().map(drop),
                _ => {
                    match place {
                        0 => area.head.0.store(value, Ordering::Relaxed),
                        1 => area.consumer.sleeps.store(value as u32, Ordering::Relaxed),
                        2 => area.consumer.delays.store(value, Ordering::Relaxed),
                        3 => area.entries[place].words[0].store(value, Ordering::Relaxed),
                        _ => area.entries[place].state.store(value, Ordering::Relaxed),
                    }
                    Ok(())
                }
            };
            prop_assert!(server.leases().count() <= 3);
            let Delays { frames, sum_us } = server.delays();
            prop_assert!(frames < 1 << 24 && sum_us < 1 << 40);
            if result.is_err() {
                return Ok(());
            }
        }
    }
}

/// What its consumer would not look for any more is skipped and counted, so that it keeps no buffer.
#[test]
fn a_frame_out_of_reach_is_skipped() {
    let (mut server, mut consumer, _area) = ends(10);
    let published: Vec<_> = (1..=8)
        .map(|number| server.publish(|_| words(number), number).unwrap())
        .collect();
    assert!(published.iter().all(|published| published.given));
    let held: Vec<_> = (0..8).map(|_| consumer.take().unwrap()).collect();
    let mut skipped = 0;
    let mut publish =
        |server: &mut Server<_, _>, number| skipped += server.publish(|_| words(number), number).unwrap().skipped;
    for number in 9..=16 {
        publish(&mut server, number);
        if number < 16 {
            let taken = consumer.take().unwrap();
            consumer.release(taken.position).unwrap();
        }
    }
    publish(&mut server, 17);
    assert!(held.iter().all(|taken| consumer.release(taken.position).is_ok()));
    (18..=24).for_each(|number| publish(&mut server, number));
    let mut taken = 0;
    while consumer.take().is_some() {
        taken += 1;
    }
    assert_eq!(server.leases().count(), taken, "one can neither be taken nor given up");
    assert_eq!(8 + 7 + taken as u32 + skipped, 24);
}
