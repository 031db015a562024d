//! When a server has ended: how a receiver comes to the next one at the same place.
//!
//! It tries to connect ten times a second, until somebody is there who answers. Then the source has changed as far as the program can see:
//! [`FormatChanged`](Kind::FormatChanged) comes, and [`follow`](crate::endpoint::Source::follow) goes on with the new server's buffers.

use nix::libc;

use super::*;

/// The time between two tries.
const TRY: Duration = Duration::from_millis(100);
/// How long the socket's file may say no before that is believed: a server that starts makes it for its own user alone, and opens it to
/// others then.
const DENIED: Duration = Duration::from_secs(5);

/// How the server has ended.
#[derive(Clone, Debug)]
pub(super) enum End {
    Said(Reason, String),
    HungUp,
    Nonsense(String),
}

/// How far it is.
#[derive(Debug)]
pub(super) struct Back {
    /// Of the next try, or of the end of one. Readable from then on until it is set again.
    timer: Timer,
    stage: Stage,
    /// Since when the socket's file says no, in µs.
    denied_us: Option<u64>,
}

#[derive(Debug)]
enum Stage {
    /// The server is there.
    There,
    /// Until this time, in µs of `CLOCK_MONOTONIC`.
    Waiting(u64),
    Joining(Joining),
    /// To be followed.
    Joined(Box<Joined>),
}

impl Receiver {
    /// From now on the end of the server, or of its source, is not the end: while it is away no frame comes, and when one is there again
    /// [`FormatChanged`](Kind::FormatChanged) does. Frames that are held stay valid. There is no [watchdog](Source::watchdog) any more: nobody
    /// knows when a server comes back, and one that says nothing is as good as away.
    ///
    /// # Errors
    /// What `timerfd_create` and `epoll_ctl` say.
    pub fn come_back_to_it(&mut self) -> Result<()> {
        if self.back.is_some() {
            return Ok(());
        }
        let about = || self.name.as_str();
        let timer = Timer::new().context("make a timer for", about)?;
        self.epoll
            .add(&timer, EpollEvent::new(EpollFlags::EPOLLIN, BACK))
            .context("wait for", about)?;
        self.back = Some(Back { timer, stage: Stage::There, denied_us: None });
        Ok(())
    }

    fn over(&self, end: &End) -> Error {
        let gone = |why: String| Error::new(Kind::Disconnected, "read frames from", self.name.clone()).because(why);
        match end {
            End::Said(Reason::Ended, _) => Error::new(Kind::Ended, "read frames from", self.name.clone()),
            End::Said(Reason::Failed, text) => gone(format!("its source failed: {text}")),
            End::Said(Reason::Refused | Reason::Full, text) => gone(format!("its server refuses: {text}")),
            End::Said(Reason::Broken, text) => {
                gone(format!("its server says that this process broke the protocol: {text}"))
            }
            End::HungUp => gone("its server is gone".to_owned()).repair("start the server, then this again"),
            End::Nonsense(why) => gone(format!("its server breaks the protocol: {why}")),
        }
    }

    /// The end, if there is one and nothing is left in the ring.
    pub(super) fn ended(&mut self) -> Result<()> {
        let Some(end) = &self.end else { return Ok(()) };
        let over = self.over(end);
        self.come_back(over)
    }

    /// One step on the way back. `over` says why the server is gone.
    ///
    /// # Errors
    /// `over`, if it is not to come back; [`Kind::FormatChanged`] when it is there; why the next server will not have it.
    pub(super) fn come_back(&mut self, over: Error) -> Result<()> {
        let broken = matches!(&self.end, Some(End::Nonsense(_) | End::Said(Reason::Refused | Reason::Broken, _)));
        let Some(back) = self.back.as_mut().filter(|_| !broken) else { return Err(over) };
        loop {
            let next = match &mut back.stage {
                Stage::There => {
                    // Nothing more comes from there, and what has hung up is readable for ever.
                    let _ = self.epoll.delete(&self.server.socket);
                    let _ = self.epoll.delete(&self.server.bell);
                    Stage::Waiting(0)
                }
                Stage::Waiting(until) if now_us() < *until => return Ok(()),
                Stage::Waiting(_) => back.begin(&self.epoll, &self.hello, &self.name)?,
                Stage::Joining(joining) => {
                    let stepped = joining.step();
                    if let Ok(false) = stepped {
                        return Ok(());
                    }
                    let _ = self.epoll.delete(&*joining);
                    match (stepped, std::mem::replace(&mut back.stage, Stage::There)) {
                        (Ok(_), Stage::Joining(joining)) => Stage::Joined(Box::new(joining.joined()?)),
                        (Err(error), Stage::Joining(joining)) if joining.may_read_instead(&error) => {
                            back.begin(&self.epoll, &self.hello.for_reading(), &self.name)?
                        }
                        (Err(error), _) => back.later(error, &self.name)?,
                        (Ok(_), other) => other,
                    }
                }
                Stage::Joined(_) => {
                    let error = Error::new(Kind::FormatChanged, "read frames from", self.name.clone());
                    return Err(error
                        .because("another server is there, with buffers of its own")
                        .repair("start again to use what comes now"));
                }
            };
            back.stage = next;
        }
    }

    /// Goes on with the next server, if it is there. Its bell is not rung yet for what it has published.
    ///
    /// # Errors
    /// What `epoll_ctl` says.
    pub(super) fn follow_back(&mut self) -> Result<()> {
        let Some(back) = self.back.as_mut().filter(|back| matches!(back.stage, Stage::Joined(_))) else {
            return Ok(());
        };
        let Stage::Joined(server) = std::mem::replace(&mut back.stage, Stage::There) else { return Ok(()) };
        let about = || self.name.as_str();
        back.timer.set(None).context("set the timer of", about)?;
        listen(&self.epoll, &server).context("wait for", about)?;
        self.again.write(1).context("wait for", about)?;
        self.ring = Consumer::new(server.area.clone());
        self.server = *server;
        (self.end, self.next, self.fence) = (None, None, None);
        self.lost.begin_with_another();
        self.begin_anew();
        Ok(())
    }
}

impl Back {
    /// Connects, or tries that again in a moment.
    ///
    /// # Errors
    /// What `epoll_ctl` and `timerfd_settime` say; why it will not help to try again.
    fn begin(&mut self, epoll: &Epoll, hello: &Hello, name: &str) -> Result<Stage> {
        let joining = match Joining::begin(hello) {
            Ok(joining) => joining,
            Err(error) => return self.later(error, name),
        };
        let input = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP, SOCKET);
        epoll.add(&joining, input).context("wait for", || name)?;
        self.timer.set(Some(joining.until_us())).context("set the timer of", || name)?;
        Ok(Stage::Joining(joining))
    }

    /// Tries again in a moment, if that may help.
    ///
    /// # Errors
    /// Why it will not.
    fn later(&mut self, error: Error, name: &str) -> Result<Stage> {
        let now = now_us();
        let may_help = match error.kind() {
            Kind::NotFound | Kind::Busy | Kind::Disconnected | Kind::Timeout => true,
            // The server itself refuses without an errno.
            Kind::Permission if error.errno() == Some(libc::EACCES) => {
                let since = *self.denied_us.get_or_insert(now);
                now.saturating_sub(since) < DENIED.as_micros() as u64
            }
            _ => return Err(error),
        };
        if !may_help {
            return Err(error);
        }
        if error.kind() != Kind::Permission {
            self.denied_us = None;
        }
        let until = now + TRY.as_micros() as u64;
        self.timer.set(Some(until)).context("set the timer of", || name)?;
        Ok(Stage::Waiting(until))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_pass_is_tried_again() {
        let mut back = Back { timer: Timer::new().unwrap(), stage: Stage::There, denied_us: None };
        let denied = || Error::from_io("connect to", "x", std::io::Error::from_raw_os_error(libc::EACCES));
        assert_eq!(denied().kind(), Kind::Permission);
        // A server that has just made its socket, or whose places are all taken.
        assert!(matches!(back.later(denied(), "x").unwrap(), Stage::Waiting(_)));
        assert!(matches!(back.later(Error::new(Kind::Busy, "join", "x"), "x").unwrap(), Stage::Waiting(_)));
        assert_eq!(back.denied_us, None);
        // One whose file says no all the time, or that says no itself.
        back.denied_us = Some(now_us() - DENIED.as_micros() as u64);
        assert_eq!(back.later(denied(), "x").unwrap_err().kind(), Kind::Permission);
        back.denied_us = None;
        assert_eq!(back.later(Error::new(Kind::Permission, "join", "x"), "x").unwrap_err().kind(), Kind::Permission);
    }
}
