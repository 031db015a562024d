//! What the server's end does besides for frames with fences.

use super::*;

#[allow(dead_code, reason = "ci/bench/share.rs, which has the ring as a part, has no fences")]
impl<A: Deref<Target = Area>, T> Server<A, T> {
    /// Whether frames were found to be given back behind a fence. One look.
    pub(in super::super) fn has_fenced(&self) -> bool {
        self.fenced != 0
    }

    /// The positions of those frames whose lease is not `known`.
    pub(in super::super) fn fenced_without(&self, known: impl Fn(&T) -> bool) -> Vec<u64> {
        let all = places(self.fenced).filter_map(|place| self.out[place].as_ref());
        let new = all.filter(|out| is_fenced(&self.area, out) && !known(&out.lease));
        new.map(|out| out.position).collect()
    }

    /// Gives those of these frames up that are not to be kept.
    pub(in super::super) fn keep_fenced(&mut self, keep: impl Fn(&T) -> bool) {
        for place in places(self.fenced) {
            let fenced = self.out[place].as_ref().filter(|out| is_fenced(&self.area, out));
            match fenced.map(|out| keep(&out.lease)) {
                Some(true) => continue,
                Some(false) => self.out[place] = None,
                // It was taken back, and the place has another frame perhaps.
                None => {}
            }
            self.fenced &= !(1 << place);
        }
    }

    /// What is kept for the frame at a position, if the consumer has it.
    pub(in super::super) fn lease_mut(&mut self, position: u64) -> Option<&mut T> {
        let out = self.out[index(position)].as_mut().filter(|out| out.position == position);
        out.map(|out| &mut out.lease)
    }

    /// Whether the frame at a position is with the consumer.
    pub(in super::super) fn is_out(&self, position: u64) -> bool {
        self.out[index(position)].as_ref().is_some_and(|out| out.position == position)
    }

    /// Takes the frames back that the consumer has not taken, and tells how many.
    ///
    /// # Errors
    /// [`Broken`].
    pub(in super::super) fn skip_untaken(&mut self) -> Result<u32, Broken> {
        let mut skipped = 0;
        // Each is one less.
        while let Some(stage) = self.skip_oldest()? {
            skipped += u32::from(stage == Stage::Skipped);
        }
        Ok(skipped)
    }
}

fn is_fenced<T>(area: &Area, out: &Out<T>) -> bool {
    area.entry(out.position).state.load(Ordering::Acquire) == word(out.position, Stage::Fenced)
}
