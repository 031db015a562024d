//! How the server's end takes frames back.

use super::*;

/// How many frames were taken back.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(in super::super) struct TakenBack {
    /// Those that the consumer had not taken.
    pub skipped: u32,
    /// Those that it had.
    pub revoked: u32,
}

impl TakenBack {
    fn count(&mut self, ended: Option<Stage>) {
        match ended {
            Some(Stage::Skipped) => self.skipped += 1,
            Some(Stage::Revoked) => self.revoked += 1,
            _ => {}
        }
    }
}

impl<A: Deref<Target = Area>, T> Server<A, T> {
    /// Takes the frames back whose lease is `like` that, taken or not: their buffers may be filled again, and the consumer is told when
    /// it looks.
    ///
    /// # Errors
    /// [`Broken`].
    pub(in super::super) fn take_back(&mut self, like: impl Fn(&T) -> bool) -> Result<TakenBack, Broken> {
        self.end_all(like, true)
    }

    /// The same for frames that the consumer has not taken. One that it is just taking is its own, however close that was.
    ///
    /// # Errors
    /// [`Broken`].
    pub(in super::super) fn skip(&mut self, like: impl Fn(&T) -> bool) -> Result<TakenBack, Broken> {
        self.end_all(like, false)
    }

    fn end_all(&mut self, like: impl Fn(&T) -> bool, taken_too: bool) -> Result<TakenBack, Broken> {
        let mut taken_back = TakenBack::default();
        for out in self
            .out
            .iter_mut()
            .filter(|out| out.as_ref().is_some_and(|out| like(&out.lease)))
        {
            taken_back.count(end(&self.area, out, taken_too)?);
        }
        Ok(taken_back)
    }

    /// Takes everything back, also from a consumer that is [`Broken`]: all its entries say so, whatever they held.
    pub(in super::super) fn take_all_back(&mut self) -> TakenBack {
        let mut taken_back = TakenBack::default();
        for out in &mut self.out {
            let Some(position) = out.as_ref().map(|out| out.position) else { continue };
            match end(&self.area, out, true) {
                Ok(stage) => taken_back.count(stage),
                Err(Broken { .. }) => {
                    // As if it had taken it: perhaps it has, and something else there can still be one that it looks at.
                    self.area
                        .entry(position)
                        .state
                        .store(word(position, Stage::Revoked), Ordering::Release);
                    before_it_is_filled();
                    *out = None;
                    taken_back.revoked += 1;
                }
            }
        }
        taken_back
    }

    /// Whether the consumer has taken a frame whose lease is `like` that, and not released it, or behind a fence.
    pub(in super::super) fn has_taken(&self, like: impl Fn(&T) -> bool) -> bool {
        self.out.iter().flatten().filter(|out| like(&out.lease)).any(|out| {
            let found = self.area.entry(out.position).state.load(Ordering::Acquire);
            found == word(out.position, Stage::Taken) || found == word(out.position, Stage::Fenced)
        })
    }
}

/// Ends one entry, if it is with the consumer, and tells as what. A frame that was taken only if that is wanted: else it goes on.
///
/// # Errors
/// [`Broken`].
pub(super) fn end<T>(area: &Area, out: &mut Option<Out<T>>, taken_too: bool) -> Result<Option<Stage>, Broken> {
    let Some(position) = out.as_ref().map(|out| out.position) else { return Ok(None) };
    let state = &area.entry(position).state;
    let mut found = state.load(Ordering::Acquire);
    // Published, taken, released: a consumer that keeps to the rules is faster twice at most.
    for _ in 0..3 {
        let to = if found == word(position, Stage::Published) {
            Stage::Skipped
        } else if found == word(position, Stage::Taken) && taken_too {
            Stage::Revoked
        } else if found == word(position, Stage::Fenced) && taken_too {
            // The consumer does not look at it any more.
            *out = None;
            return Ok(Some(Stage::Revoked));
        } else if found == word(position, Stage::Taken) || found == word(position, Stage::Fenced) {
            return Ok(None);
        } else if found == word(position, Stage::Released) {
            *out = None;
            return Ok(Some(Stage::Released));
        } else {
            break;
        };
        match state.compare_exchange(found, word(position, to), Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => {
                before_it_is_filled();
                *out = None;
                return Ok(Some(to));
            }
            Err(now) => found = now,
        }
    }
    Err(Broken { position, found })
}

/// Who reads a buffer whose frame was taken back, and finds what it was filled with since, finds that it was taken back too: with this fence
/// after the state, and [its own](Area::holds) before it looks at that, the state comes first also where stores pass each other.
fn before_it_is_filled() {
    fence(Ordering::Release);
}
