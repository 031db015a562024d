//! What it costs that a frame changes hands between processes, by `bench-share`; beside it a message of a socket for each frame, and a copy
//! of the frame.

use anyhow::{Context, Result};
use serde::Serialize;

use crate::{measure, median_cost, programs};

/// How many runs of each length; the median counts. The guest's clock counts the same each time, but for its timer's interrupts.
const RUNS: usize = 3;
/// Frames of the long and the short run for system calls, where there are any: each is dear to count.
const CALLS: (u32, u32) = (600, 100);

/// How a frame changes hands: a mode of `bench-share`, which documents them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// The ring alone.
    Ring,
    /// `Server` and `Receiver`; a frame is there whenever the consumer looks.
    Awake,
    /// The same for a consumer that sleeps before each frame.
    Asleep,
    /// A message there and one back.
    Message,
    /// The picture copied.
    Memcpy,
}

/// What it costs, a frame. Instructions are of user space and the kernel together: of user space alone where there are no system calls.
#[derive(Clone, Debug, Serialize)]
pub struct HandOver {
    pub way: Way,
    /// Not of one that sleeps: there what waits for the time is in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instructions: Option<f64>,
    pub calls: Vec<Calls>,
}

/// System calls a frame.
#[derive(Clone, Debug, Serialize)]
pub struct Calls {
    /// By whom.
    pub by: &'static str,
    pub calls: f64,
}

impl Way {
    /// The name for `--only`, and of this part in the JSON.
    pub const NAME: &str = "handover";
    pub const ALL: [Way; 5] = [Way::Ring, Way::Awake, Way::Asleep, Way::Message, Way::Memcpy];

    /// As `bench-share` calls it.
    pub fn name(self) -> &'static str {
        match self {
            Way::Ring => "ring",
            Way::Awake => "awake",
            Way::Asleep => "asleep",
            Way::Message => "message",
            Way::Memcpy => "memcpy",
        }
    }

    /// What it is, for people.
    pub fn what(self) -> &'static str {
        match self {
            Way::Ring => "published, taken, released in the ring",
            Way::Awake => "the same by Server and Receiver, with all that they keep of a frame",
            Way::Asleep => "the same for a consumer that sleeps before each frame",
            Way::Message => "a message of a socket for each frame, and one back",
            Way::Memcpy => "a frame of XR24 1280x720 copied",
        }
    }

    /// Frames of the long and the short run for instructions: some ten million of them at least, beside which the microsecond is little in
    /// which the kernel tells CPU time.
    fn frames(self) -> Option<(u32, u32)> {
        match self {
            Way::Ring => Some((550_000, 50_000)),
            Way::Awake => Some((110_000, 10_000)),
            Way::Asleep => None,
            Way::Message => Some((11_000, 1_000)),
            Way::Memcpy => Some((220, 20)),
        }
    }

    /// The same for system calls. Where there are none there are many frames, beside which those of the start do not count: they wait for
    /// the first frame, more often or less.
    fn counted(self) -> (u32, u32) {
        match self {
            Way::Ring | Way::Awake => self.frames().unwrap_or(CALLS),
            Way::Asleep | Way::Message | Way::Memcpy => CALLS,
        }
    }

    /// Who makes system calls, and which: all, if none is named. Both sides are threads of one process, so their calls are told apart by
    /// their names; among all are those as well by which the program waits before each frame that finds its consumer asleep.
    fn callers(self) -> &'static [(&'static str, &'static [&'static str])] {
        match self {
            Way::Ring | Way::Awake | Way::Message => &[("both", &[])],
            Way::Asleep => &[
                ("server", &["write", "sendto", "sendmsg"]),
                ("consumer", &["epoll_wait", "epoll_pwait", "epoll_pwait2", "poll", "ppoll"]),
                ("all", &[]),
            ],
            Way::Memcpy => &[],
        }
    }

    fn command(self, frames: u32) -> Vec<String> {
        vec![programs::sibling("bench-share"), self.name().to_owned(), frames.to_string()]
    }

    /// Measures it.
    pub fn measure(self) -> Result<HandOver> {
        let each = |long: f64, short: f64, frames: (u32, u32)| (long - short) / f64::from(frames.0 - frames.1);
        let cost = |frames: (u32, u32)| {
            let (long, _) = median_cost(&self.command(frames.0), RUNS)?;
            let (short, _) = median_cost(&self.command(frames.1), RUNS)?;
            anyhow::Ok(each(long, short, frames))
        };
        let instructions = self.frames().map(cost).transpose()?;
        let calls = |&(by, names): &(&'static str, &[&str])| {
            let of = |frames| measure::system_calls(&self.command(frames), names);
            let counted = self.counted();
            let calls = each(of(counted.0)? as f64, of(counted.1)? as f64, counted);
            anyhow::Ok(Calls { by, calls })
        };
        let calls = self.callers().iter().map(calls).collect::<Result<_>>();
        Ok(HandOver { way: self, instructions, calls: calls.context(self.name())? })
    }
}
